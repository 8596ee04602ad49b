"""Pathology tiles: repeatable, in disjoint splits; reports read back and hold under slight blur."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageFilter
import pytest

from medim.data import pathology
from medim.data.pathology import FINDINGS, SPLITS, TILE, findings, measure, parse, position, report, study
from medim.data.studies import Study
from medim.errors import UserError


def picture(record: Study) -> PIL.Image.Image:
    pixels = record.images[0].pixels
    assert isinstance(pixels, PIL.Image.Image)
    return pixels


@functools.cache
def tiles(split: str, n: int = 250) -> tuple[Study, ...]:
    return tuple(study(0, index, split) for index in range(n))


def truth(image: PIL.Image.Image) -> list[bool]:
    return list(findings(measure(image)).values())


def test_a_study_is_a_function_of_seed_index_and_split() -> None:
    first, again = study(3, 12, "test"), study(3, 12, "test")
    assert first.id == "pathology-test-000012"
    assert first.report == again.report and picture(first).tobytes() == picture(again).tobytes()
    assert picture(first).size == (TILE, TILE) and picture(first).mode == "RGB"
    others = [study(4, 12, "test"), study(3, 13, "test"), study(3, 12, "validation")]
    assert all(picture(other).tobytes() != picture(first).tobytes() for other in others)


def test_splits_are_thirty_rows_apart_and_tiles_stay_inside() -> None:
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert max(one.top, other.top) - min(one.bottom, other.bottom) >= 30
    for split, box in SPLITS.items():
        for index in range(200):
            top, left = position(0, index, split)
            assert box.top <= top <= box.bottom - TILE and box.left <= left <= box.right - TILE


def test_the_tile_is_the_region_at_its_position_in_one_of_eight_orientations() -> None:
    region, seen = pathology.REGIONS["train"], set()
    with PIL.Image.open(Path(pathology.__file__).parents[1] / "assets" / "pathology" / "train.jpg") as file:
        whole = np.asarray(file.convert("RGB"))
    for index in range(60):
        top, left = position(0, index, "validation")
        cut = whole[top - region.top :, left - region.left :][:TILE, :TILE]
        tile = np.asarray(picture(study(0, index, "validation")))
        turned = [np.rot90(side, turns) for side in (cut, cut[:, ::-1]) for turns in range(4)]
        seen.add(next(i for i, candidate in enumerate(turned) if np.array_equal(candidate, tile)))
    assert seen == set(range(8))


@pytest.mark.parametrize("split", SPLITS)
def test_tiles_hold_tissue_and_neither_keratin_nor_ink(split: str) -> None:
    for index, record in enumerate(tiles(split)):
        pixels = np.asarray(picture(record)).astype(int)
        assert (pixels[..., 1] < 200).mean() > 0.49
        assert (pixels[..., 1] > pixels[..., 0] + 20).mean() < 0.01
        top, left = position(0, index, split)
        corners = [(left + x, top + y) for x in (0, TILE) for y in (0, TILE)]
        assert not any(1450 < x < 1600 and 1250 < y < 1650 for x, y in corners)  # the heart of the keratin


def test_every_report_reads_back_exactly() -> None:
    rng = np.random.default_rng(0)
    wordings = set()
    for _ in range(3000):
        bands = rng.integers(3, size=3)
        stated = {name: bool(i % 3 == bands[i // 3]) for i, name in enumerate(FINDINGS)}
        text = report(stated, rng)
        assert parse(text) == stated, text
        assert len(text.split()) <= 35 and 2 <= text.count(".") <= 4
        wordings.add(text)
    assert len(wordings) > 1500
    assert len({word for text in wordings for word in text.lower().replace(".", "").replace(",", "").split()}) < 60


@pytest.mark.parametrize("text", ["", "@@ ##", "no acute cardiopulmonary process.", "white space. nuclei, epithelium"])
def test_what_is_not_said_is_false(text: str) -> None:
    assert parse(text) == dict.fromkeys(FINDINGS, False)


def test_parts_of_a_garbled_report_are_still_read() -> None:
    said = {name for name, value in parse("skin skin  LOW\ncellularity the the, no white space no").items() if value}
    assert said == {"low cellularity", "no white space"}


@pytest.mark.parametrize("split", SPLITS)
def test_reports_say_what_is_measured(split: str) -> None:
    assert all(list(parse(record.report).values()) == truth(picture(record)) for record in tiles(split))


@pytest.mark.parametrize(("split", "rarest"), [("train", 0.08), ("test", 0.04)])
def test_no_finding_is_rare(split: str, rarest: float) -> None:
    shares = np.mean([truth(picture(record)) for record in tiles(split)], axis=0)
    assert shares.min() >= rarest, dict(zip(FINDINGS, shares, strict=True))


@pytest.mark.parametrize("split", SPLITS)
def test_findings_survive_the_blur_of_a_reconstruction(split: str) -> None:
    sharp = [picture(record) for record in tiles(split)]
    blurred = [image.filter(PIL.ImageFilter.GaussianBlur(1)) for image in sharp]
    agreement = np.mean([np.equal(truth(a), truth(b)) for a, b in zip(sharp, blurred, strict=True)], axis=0)
    assert agreement.min() >= 0.9, dict(zip(FINDINGS, agreement, strict=True))


def test_measurement_of_plain_colours() -> None:
    white, pink, purple = (measure(PIL.Image.new("RGB", (96, 96), c)) for c in ("#f3f3f3", "#e07090", "#78508a"))
    assert white.white == 1 and white.nuclei == white.epithelium == white.collagen == 0
    assert pink.collagen == 1 and pink.nuclei == pink.white == 0
    assert purple.epithelium == 1 and purple.nuclei == 0


@pytest.mark.parametrize("arguments", [(0, 0, "val"), (-1, 0, "train"), (0, -1, "train")])
def test_mistakes_are_told(arguments: tuple[int, int, str]) -> None:
    with pytest.raises(UserError):
        study(*arguments)
