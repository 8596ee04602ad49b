"""Pictures taken otherwise: what moves, what stays, and that maps keep their numbers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from medim.canvas import ROLES
from medim.data import prepare
from medim.data.augment import Augmentation
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.objective import ObjectiveOptions
from medim.tokenization.joint import JointTokenizer
from medim.training.task import Rows, Shown


def dot(x: int, y: int, value: int = 200) -> PIL.Image.Image:
    values = np.zeros((40, 60), np.uint8)
    values[y - 1 : y + 2, x - 1 : x + 2] = value
    return PIL.Image.fromarray(values)


def centre(picture: PIL.Image.Image) -> tuple[float, float]:
    values = np.asarray(picture, float)
    ys, xs = np.mgrid[: values.shape[0], : values.shape[1]]
    return float((xs * values).sum() / values.sum()), float((ys * values).sum() / values.sum())


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (Augmentation(), (40, 20)),
        (Augmentation(shift=(0.1, -0.2)), (46, 12)),
        (Augmentation(scale=1.5), (29.5 + 1.5 * 10.5, 19.5 + 1.5 * 0.5)),
        (Augmentation(angle=90.0), (29.5 + 0.5, 19.5 - 10.5)),  # counter-clockwise: what was right is up
    ],
)
def test_geometry(change: Augmentation, wanted: tuple[float, float]) -> None:
    assert centre(change(dot(40, 20), "mri", "t1")) == pytest.approx(wanted, abs=0.3)


def test_only_contrasts_are_recoloured() -> None:
    change = Augmentation(gamma=2.0, gain=1.1)
    wanted = round(255 * 1.1 * (100 / 255) ** 2)
    for modality, view, value in (
        ("mri", "t1", wanted), ("xray", "PA", wanted), ("mri", "GM axial", 100), ("ct", "soft", 100),
    ):  # fmt: skip
        assert np.asarray(change(dot(30, 20, 100), modality, view)).max() == value
    coloured = change(PIL.Image.new("RGB", (8, 8), (10, 20, 30)), "pathology", "")
    assert coloured.mode == "RGB" and (np.asarray(coloured) == (10, 20, 30)).all()
    drawn = [Augmentation.draw(np.random.default_rng(n)) for n in range(50)]
    assert len(set(drawn)) == 50 and all(abs(one.angle) <= 10 and 0.88 <= one.scale <= 1.12 for one in drawn)


def noise(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96), dtype=np.uint8))


def studies() -> list[Study]:
    views = ("gm axial", "t1 axial", "wm axial")
    return [
        Study(f"s{n}", "p", tuple(Image("mri", noise(3 * n + k), view) for k, view in enumerate(views)), "Clear.")
        for n in range(3)
    ]


@pytest.fixture
def rows(tiny_joint: JointTokenizer, tmp_path: Path) -> Rows:
    """Three studies of three images, taken in four ways."""
    joint = JointTokenizer.build(tiny_joint.text, tiny_joint.image, tiny_joint.slot)
    how = prepare.Encoding(joint.image, joint.text, views=4)
    index = prepare.prepare(studies, how, tmp_path / "data", source="t")
    assert index["views"] == 4
    return Rows(joint, [prepare.load(tmp_path / "data", joint.image)], Shown(3, absent=0.4, untold=0.5))


def test_views_are_stored_beside_and_are_the_same_wherever_a_study_stands(
    rows: Rows, tiny_joint: JointTokenizer, tmp_path: Path
) -> None:
    how = prepare.Encoding(tiny_joint.image, tiny_joint.text, views=4)
    prepare.prepare(lambda: studies()[::-1], how, tmp_path / "other", source="t", total=3)
    other = prepare.load(tmp_path / "other")
    first = rows.data[0][0]
    assert other[2]["images"] == first["images"]
    for image, given in zip(first["images"], studies()[0].images, strict=True):
        assert len(image["augmented"]) == 3 and len({tuple(one) for one in image["augmented"]}) > 1
        assert image["codes"] == rows.joint.image_codes(given).flatten().tolist()
    with pytest.raises(UserError, match="views=4, wanted None"):
        prepare.prepare(studies, prepare.Encoding(tiny_joint.image, tiny_joint.text), tmp_path / "other", source="t")
    assert json.loads((tmp_path / "other" / "prepare.json").read_text())["views"] == 4


def test_what_is_left_off_and_left_untold(rows: Rows) -> None:
    """Any subset but none, in the order of the table. Words that all images share are left untold by halves, for all of
    them; what tells two images apart is always told."""
    seen, planes, several = set(), 0, 0
    for n in range(300):
        row = rows.row(0, 0, 0, np.random.default_rng(n))
        views = row.views[: row.roles.count(ROLES.index("image"))]
        assert row.roles
        seen.add((len(views), len(row.roles) > len(views)))
        if len(views) > 1:
            names = tuple(view.split()[0] for view in views)
            assert names == tuple(one for one in ("t1", "gm", "wm") if one in names)
            told = {"axial" in view for view in views}
            assert len(told) == 1
            planes, several = planes + (told == {True}), several + 1
    assert len(seen) == 7 and 0.35 < planes / several < 0.65
    again = rows.row(0, 0, 0, np.random.default_rng(5))
    assert again.ids.tolist() == rows.row(0, 0, 0, np.random.default_rng(5)).ids.tolist()
    whole = rows.row(0, 0)
    assert whole.views == ("t1 axial", "gm axial", "wm axial", "") and rows.seen()[1] == {
        "mri": {"gm axial": 3, "t1 axial": 3, "wm axial": 3}
    }


def test_images_of_a_study_are_taken_alike(rows: Rows) -> None:
    record, first = rows.data[0][0], rows.joint.vocabulary.image[0]
    ways = [[image["codes"], *image["augmented"]] for image in record["images"]]
    used = set()
    for n in range(60):
        row = rows.row(0, 0, 0, np.random.default_rng(n))
        for number, view in enumerate(row.views):
            if view and view != "axial":
                image = ("gm", "t1", "wm").index(view.split()[0])
                codes = (row.ids[row.segment == number] - first).tolist()
                used.add(ways[image].index(codes))
                break
    assert used == {0, 1, 2, 3}


def test_stages_show_what_they_name(rows: Rows) -> None:
    for show, wanted in (
        (("text", "t1"), {"t1", "text"}),
        (("gm", "wm"), {"gm", "wm"}),
        (("mri",), {"t1", "gm", "wm"}),
        (("ct",), {"t1", "gm", "wm", "text"}),  # none of it: shown whole
    ):
        found = set()
        for n in range(60):
            row = rows.row(0, 0, 0, np.random.default_rng(n), show)
            images = row.roles.count(ROLES.index("image"))
            found |= {view.split()[0] for view in row.views[:images] if view not in ("", "axial")}
            found |= {"text"} if len(row.roles) > images else set()
        assert found == wanted


def test_single_segments_for_the_losses_beside(rows: Rows) -> None:
    rngs = [np.random.default_rng(n) for n in range(3)]
    pairs = rows.alone([(0, 0), (0, 1), (0, 2)], rngs, twins=False)
    assert pairs.images.role.shape == (3, 1) and pairs.others.kind.max() == 0 and pairs.group.tolist() == [3, 3, 3]
    twins = rows.alone([(0, 0), (0, 1)], rngs[:2], twins=True)
    here = twins.images.segment >= 0
    assert here.equal(twins.others.segment >= 0) and not twins.images.ids.equal(twins.others.ids)
    assert ObjectiveOptions().align == ObjectiveOptions().invariance == 0


def test_a_batch_without_pairs_has_a_pair_that_counts_nowhere(rows: Rows) -> None:
    rows.data = [rows.data[0].map(lambda one: one | {"report": ""})]
    found = rows.alone([(0, 0)], [np.random.default_rng(0)], twins=False)
    assert found.group.tolist() == [-1]
