"""How well a tokenizer gives pictures back, by modality: figures and a sheet to look at."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
import PIL.Image
import torch

from medim.errors import UserError
from medim.metrics.distribution import frechet_distance
from medim.metrics.features import Extractor, load_extractor
from medim.metrics.image import psnr, ssim
from medim.tokenization.image import VQTokenizer
from medim.training.codebook import perplexity
from medim.vocabulary import MODALITIES

Figures = dict[str, int | float]

BATCH = 16
FRECHET_IMAGES = 128  # with fewer the covariance of 1280 features says nothing
SHOWN = 8
GAP = 2  # pixels


@torch.no_grad()
def evaluate(
    model: VQTokenizer, pictures: Mapping[str, Sequence[PIL.Image.Image]], frechet: bool = False
) -> dict[str, Figures]:
    """By modality and for "all": images, PSNR in dB and SSIM (means over 8-bit pictures), codes used, perplexity.

    Gray modalities are compared in gray. PSNR of equal pictures counts as 100 dB. FID_EffLite0, the Fréchet distance of
    EfficientNet-lite0's features, is there if `frechet`, the package is installed and there are enough pictures.
    """
    features = _features(model) if frechet else None
    results: dict[str, Figures] = {}
    total = torch.zeros(model.codebook_size, dtype=torch.double)
    for name, originals in pictures.items():
        codes, again = round_trip(model, originals, MODALITIES[name].gray)
        real = [image.convert("L") if MODALITIES[name].gray else image for image in originals]
        pairs = list(zip(real, again, strict=True))
        use = torch.bincount(codes.flatten(), minlength=model.codebook_size).double()
        total += use
        results[name] = {
            "images": len(real),
            "psnr_db": round(float(np.mean([min(100.0, psnr(a, b)) for a, b in pairs])), 2),
            "ssim": round(float(np.mean([ssim(a, b) for a, b in pairs])), 4),
            **_use(use),
        }
        if features is not None and len(real) >= FRECHET_IMAGES:
            results[name]["FID_EffLite0"] = round(frechet_distance(*map(features, (real, again))), 3)
    return results | {"all": _use(total)}


@torch.no_grad()
def round_trip(
    model: VQTokenizer, pictures: Sequence[PIL.Image.Image], gray: bool
) -> tuple[torch.Tensor, list[PIL.Image.Image]]:
    """Codes [B, h, w] and what they decode to."""
    codes = torch.cat([model.encode(pictures[i : i + BATCH]).cpu() for i in range(0, len(pictures), BATCH)])
    again = []
    for part in codes.split(BATCH):
        again += cast(list[PIL.Image.Image], model.decode(part, gray=gray))
    return codes, again


def _use(use: torch.Tensor) -> Figures:
    return {"codes_used": int((use > 0).sum()), "perplexity": round(perplexity(use), 1)}


def _features(model: VQTokenizer) -> Extractor | None:
    try:
        return load_extractor("efficientnet-lite0", str(model.device))
    except UserError:
        return None


def contact_sheet(model: VQTokenizer, pictures: Mapping[str, Sequence[PIL.Image.Image]]) -> PIL.Image.Image:
    """Two rows a modality: originals, and under them what their codes decode to."""
    rows: list[list[PIL.Image.Image]] = []
    for name, originals in pictures.items():
        shown = list(originals[:SHOWN])
        rows += [shown, round_trip(model, shown, MODALITIES[name].gray)[1]]
    return tiled(rows)


def tiled(rows: Sequence[Sequence[PIL.Image.Image]]) -> PIL.Image.Image:
    """Rows of pictures on white."""
    width = max((sum(image.width + GAP for image in row) for row in rows), default=0) + GAP
    heights = [max((image.height for image in row), default=0) + GAP for row in rows]
    sheet = PIL.Image.new("RGB", (max(width, 1), math.ceil(sum(heights)) + GAP), "white")
    top = GAP
    for row, height in zip(rows, heights, strict=True):
        left = GAP
        for image in row:
            sheet.paste(image.convert("RGB"), (left, top))
            left += image.width + GAP
        top += height
    return sheet
