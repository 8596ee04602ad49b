"""Cycle spinning of translations (Coifman & Donoho 1995): the mean over sources moved by fractions of a code.

A code stands for a square of pixels, so what is lost depends on where the squares fall. A translation of a source that
was moved, moved back, errs otherwise; the mean errs less. Shape letters: H W pixels, f pixels a code along one side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Shaped

from medim.given import Request
from medim.tokenization.image import VQTokenizer
from medim.vocabulary import MODALITIES

Shift = tuple[int, int]  # pixels to the right and down


def shifts(spin: int, code: int) -> list[Shift]:
    """The `spin` squared shifts within a code of `code` pixels a side, none at all first.

    Example:
        >>> shifts(2, 6), len(shifts(3, 6))
        ([(0, 0), (0, 3), (3, 0), (3, 3)], 9)
    """
    steps = [(n - (spin - 1) // 2) * code // spin for n in range(spin)]
    return sorted(((right, down) for right in steps for down in steps), key=lambda shift: shift != (0, 0))


def moved(values: Shaped[np.ndarray, "H W *C"], shift: Shift, fill: float | int) -> Shaped[np.ndarray, "H W *C"]:
    """A picture moved; what comes in at the edges is `fill`."""
    made = np.full_like(values, fill)
    (right, down), (height, width) = shift, values.shape[:2]
    to = slice(max(down, 0), height + min(down, 0)), slice(max(right, 0), width + min(right, 0))
    made[to] = values[max(-down, 0) : height + min(-down, 0), max(-right, 0) : width + min(-right, 0)]
    return made


def spun(request: Request, image: VQTokenizer, spin: int) -> list[Request]:
    """A translation's request as one for each shift, its sources prepared and moved."""
    prepared = [(one, image.prepare(one.pixels, MODALITIES[one.modality].gray)) for one in request.sources]
    made = []
    for shift in shifts(spin, image.downsampling):
        sources = []
        for one, picture in prepared:
            gray = MODALITIES[one.modality].gray
            values = np.asarray(picture.convert("L" if gray else "RGB"))
            sources.append(replace(one, pixels=PIL.Image.fromarray(moved(values, shift, 0 if gray else 255))))
        made.append(replace(request, sources=tuple(sources)))
    return made


def mean_of(samples: Sequence[Any], spin: int, code: int) -> Any:
    """The sample whose picture is the mean of those of all shifts, moved back; the rest of it is the first's."""
    stack = [
        moved(np.asarray(one.picture, np.float32), (-right, -down), np.nan)
        for one, (right, down) in zip(samples, shifts(spin, code), strict=True)
    ]
    mean = np.nanmean(np.stack(stack), 0).round().astype(np.uint8)
    stats = dict(samples[0].stats)
    stats |= {name: sum(one.stats[name] for one in samples) for name in ("forward_passes", "seconds")}
    return replace(
        samples[0], picture=PIL.Image.fromarray(mean), stats=stats | {"plan": f"{stats['plan']} spin {spin}"}
    )
