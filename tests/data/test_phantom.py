"""The chest X-ray phantom: repeatable, in disjoint splits; reports read back; what is told is what is drawn."""

from __future__ import annotations

import itertools

import numpy as np
import PIL.Image
import pytest

from medim.data import embedded, pathology
from medim.data.phantom import FINDINGS, SIZE, SPLITS, Anatomy, draw_anatomy, parse, render, report, study
from medim.data.studies import Study

NORMAL = Anatomy("normal", {}, {}, ())


def pixels(record: Study) -> np.ndarray:
    image = record.images[0].pixels
    assert isinstance(image, PIL.Image.Image) and image.mode == "L"
    return np.asarray(image)


def test_a_study_is_a_function_of_seed_index_and_split() -> None:
    first, again = study(3, 12, "test"), study(3, 12, "test")
    assert first.report == again.report and (pixels(first) == pixels(again)).all()
    assert (first.id, first.split, first.source, first.images[0].modality) == (
        "xray-test-000012",
        "test",
        "phantom",
        "xray",
    )
    assert pixels(first).shape == (SIZE, SIZE)
    for other in (study(4, 12, "test"), study(3, 13, "test"), study(3, 12, "validation"), study(3, 12)):
        assert (pixels(other) != pixels(first)).mean() > 0.5


def test_splits_share_no_study() -> None:
    ranges = sorted(SPLITS.values(), key=lambda r: r.start)
    assert all(before.stop <= after.start for before, after in itertools.pairwise(ranges))
    with pytest.raises(IndexError):
        study(0, len(SPLITS["test"]), "test")
    assert study(0, len(SPLITS["validation"]) - 1, "validation").split == "validation"


def test_three_thousand_reports_read_back() -> None:
    found = np.zeros(len(FINDINGS))
    texts = set()
    for index in range(3000):
        anatomy = draw_anatomy(np.random.default_rng([index, 0]))
        text = report(anatomy, np.random.default_rng([index, 1]))
        assert parse(text) == anatomy.findings(), text
        assert 3 <= text.count(".") <= 7 and text == text.strip()
        found += list(anatomy.findings().values())
        texts.add(text)
    rates = found / 3000
    assert (rates > 0.08).all() and (rates < 0.45).all()  # each is common enough to be learnt
    assert len(texts) > 1500


def test_parse_reads_denials_and_both_sides() -> None:
    assert not any(parse("No pleural effusion. The heart is not enlarged. No pneumothorax.").values())
    both = parse("Small bilateral pleural effusion. Opacity in the left mid zone; mild cardiomegaly")
    names = {name for name, present in both.items() if present}
    assert names == {"right effusion", "left effusion", "left mid opacity", "cardiomegaly"}


# The patient's right is on the left of the image. Each finding: how it is drawn, where, and what it does to the mean.
DRAWN = {
    "right effusion": (Anatomy("normal", {"right": "large"}, {}, ()), (slice(50, 78), slice(20, 38)), 40),
    "left effusion": (Anatomy("normal", {"left": "large"}, {}, ()), (slice(50, 78), slice(58, 76)), 40),
    "right pneumothorax": (Anatomy("normal", {}, {"right": "large"}, ()), (slice(25, 60), slice(16, 22)), -10),
    "left pneumothorax": (Anatomy("normal", {}, {"left": "large"}, ()), (slice(25, 60), slice(74, 80)), -10),
    "cardiomegaly": (Anatomy("marked", {}, {}, ()), (slice(55, 72), slice(66, 74)), 20),
    **{
        f"{side} {zone} opacity": (
            Anatomy("normal", {}, {}, ((side, zone),)),
            (slice(row - 5, row + 5), slice(column - 5, column + 5)),
            25,
        )
        for side, column in (("right", 28), ("left", 68))
        for zone, row in (("upper", 27), ("mid", 45), ("lower", 64))
    },
}


def mean_image(anatomy: Anatomy) -> np.ndarray:
    return np.mean([render(anatomy, np.random.default_rng(seed)).astype(float) for seed in range(12)], axis=0)


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return mean_image(NORMAL)


@pytest.mark.parametrize("name", FINDINGS)
def test_a_finding_is_seen_where_it_is_told(name: str, normal: np.ndarray) -> None:
    anatomy, where, least = DRAWN[name]
    assert [key for key, present in anatomy.findings().items() if present] == [name]
    change = mean_image(anatomy) - normal
    assert change[where].mean() * np.sign(least) > abs(least)
    mirrored = change[:, ::-1][where].mean() * np.sign(least)
    assert abs(mirrored) < 0.5 * abs(change[where].mean())


def test_the_mixture_has_both_domains_in_fixed_places() -> None:
    domains = [embedded.domain_of(index) for index in range(1000)]
    assert domains.count("xray") == 700 and domains[:10] == domains[10:20] == domains[-10:]
    tissue = [make() for make in embedded.studies(4, "test", 0, xrays_in_ten=0)]
    assert [one.images[0].modality for one in tissue] == ["pathology"] * 4
    some = [embedded.study(0, index, "test") for index in range(4, 10)]
    assert [one.images[0].modality for one in some] == [embedded.domain_of(index) for index in range(4, 10)]
    for one in some:
        assert any(embedded.PARSERS[one.images[0].modality](one.report).values()) or "normal" in one.report.lower()


@pytest.mark.parametrize("split", ["train", "test"])
def test_more_pixels_are_the_same_study_drawn_finer(split: str) -> None:
    for index in range(8):
        small, large = (study(3, index, split, pixels=side) for side in (96, 128))
        assert small.report == large.report
        a, b = (one.images[0].pixels for one in (small, large))
        assert a.size == (96, 96) and b.size == (128, 128)
        shrunk = np.asarray(b.resize((96, 96), PIL.Image.Resampling.BOX), dtype=float)
        assert np.abs(shrunk - np.asarray(a, dtype=float)).mean() < 4  # of 255: mostly the grain


@pytest.mark.parametrize("resolution, side", [(96, 96), (128, 128), (7, 32), (55, 54), (512, 256)])
def test_pictures_are_drawn_for_their_tokenizer(resolution: int, side: int) -> None:
    assert embedded.side_for(resolution) == side


def test_larger_tiles_are_tissue_of_the_same_split() -> None:
    for index in range(8):
        row, column = pathology.position(3, index, "test", 128)
        box = pathology.SPLITS["test"]
        assert box.top <= row <= box.bottom - 128 and box.left <= column <= box.right - 128
        one = pathology.study(3, index, "test", 128)
        picture = one.images[0].pixels
        assert picture.size == (128, 128) and picture == pathology.study(3, index, "test", 128).images[0].pixels
        assert pathology.parse(one.report) == pathology.findings(pathology.measure(picture))
