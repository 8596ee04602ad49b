"""Cycle spinning: shifts, moving there and back, the mean, and translations made so."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from medim.data.studies import Image
from medim.errors import UserError
from medim.given import Request
from medim.pipeline import MeDiM, Sample
from medim.sampling import Plan, Sampling
from medim.spinning import mean_of, moved, shifts, spun


@dataclass(frozen=True)
class Made:
    picture: PIL.Image.Image
    stats: dict[str, Any] = field(default_factory=lambda: {"plan": "p", "forward_passes": 1, "seconds": 0.5})


def picture(seed: int = 0) -> PIL.Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (12, 12), dtype=np.uint8)
    return PIL.Image.fromarray(values).resize((96, 96), PIL.Image.Resampling.BICUBIC)


def apart(one: Sample, other: Sample) -> int:
    """The largest difference of two pictures, in gray levels."""
    return int(np.abs(np.asarray(one.image, int) - np.asarray(other.image, int)).max())


def test_shifts_share_a_code_evenly() -> None:
    for spin, code in ((1, 6), (2, 6), (3, 6), (2, 16), (4, 16)):
        found = shifts(spin, code)
        assert found[0] == (0, 0) and len({(r % code, d % code) for r, d in found}) == spin**2
        assert {r % code for r, _ in found} == {n * code // spin for n in range(spin)}


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -2), (-4, 5)])
def test_what_is_moved_there_and_back_is_itself(shift: tuple[int, int]) -> None:
    values = np.arange(12 * 10, dtype=np.float32).reshape(12, 10)
    away = moved(values, shift, np.nan)
    right, down = shift
    assert away[6, 5] == values[6 - down, 5 - right]
    back = moved(away, (-right, -down), np.nan)
    inside = ~np.isnan(back)
    assert np.array_equal(back[inside], values[inside]) and inside.sum() == (10 - abs(right)) * (12 - abs(down))


def test_the_mean_of_moved_pictures_is_the_picture() -> None:
    """A translation that moves with its source is unchanged, up to its edges; one that errs by squares errs less."""
    values = np.asarray(picture())
    same = [Made(PIL.Image.fromarray(moved(values, shift, 0))) for shift in shifts(3, 6)]
    found = mean_of(same, 3, 6)
    assert np.array_equal(np.asarray(found.picture), values)
    assert found.stats == {"plan": "p spin 3", "forward_passes": 9, "seconds": 4.5}


def test_translations(tiny_model: Path) -> None:
    """By the pipeline as by hand; the batch changes nothing; other tasks are as they were."""
    model = MeDiM.from_pretrained(tiny_model)
    code = model.joint.image.downsampling
    how = Sampling(image=Plan("confidence", steps=2, temperature=0.0), mean=True)
    requests = [Request(str(n), "xray", (0, n), sources=(Image("pathology", picture(n)),)) for n in range(3)]

    def made(spin: int, batch_size: int, some: list[Request] = requests) -> list[Sample]:
        plan = Sampling(image=how.image, mean=True, spin=spin)
        return list(model.generate("translate", some, sampling=plan, batch_size=batch_size))

    spun_by_4 = made(2, 16)
    assert [one.id for one in spun_by_4] == ["0", "1", "2"]
    for batch_size in (1, 5):
        again = made(2, batch_size)
        assert all(apart(a, b) <= 1 for a, b in zip(again, spun_by_4, strict=True))  # sums round by the batch
    by_hand = mean_of([made(1, 4, [one])[0] for one in spun(requests[1], model.joint.image, 2)], 2, code)
    assert apart(by_hand, spun_by_4[1]) <= 1 < apart(made(1, 4)[1], by_hand)
    assert spun_by_4[1].stats["forward_passes"] == 8 and spun_by_4[1].stats["plan"].endswith("mean spin 2")
    with pytest.raises(UserError, match=f"spin={code + 1}: a code of .* is {code} pixels wide"):
        made(code + 1, 1)
    with pytest.raises(ValueError, match="spin=0: a whole number from 1"):
        Sampling(spin=0)
    pairs = [list(model.generate("pair", [Request("p", "xray", (1,))], sampling=Sampling(spin=s))) for s in (1, 2)]
    assert pairs[0][0].report == pairs[1][0].report and pairs[0][0].stats["plan"] == pairs[1][0].stats["plan"]
