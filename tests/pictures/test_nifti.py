"""Slices of volumes: every corner where radiology wants it, windows by hand, damage told; and real heads."""

from __future__ import annotations

import importlib.util
import itertools
import os
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medim.errors import UserError
from medim.pictures import Pixels
from medim.pictures.nifti import AXIS, PLANES, Plane, Slice, read_grid, read_volume

RAS = np.diag([2.0, 3.0, 4.0, 1.0])


def save(path: Path, values: Any, affine: Any = RAS) -> Path:
    nibabel.save(nibabel.Nifti1Image(np.asarray(values), affine), path)
    return path


def landmarks() -> np.ndarray:
    """Right 40, front 60, head 90, left-back-foot 10, all else 1; 9 x 10 x 12 voxels, RAS."""
    values = np.ones((9, 10, 12), np.int16)
    values[-1, 5, 6], values[4, -1, 6], values[4, 5, -1], values[0, 0, 0] = 40, 60, 90, 10
    return values


@pytest.mark.parametrize("flips", list(itertools.product([1, -1], repeat=3)))
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_any_storage_order_gives_the_same_slices(
    tmp_path: Path, order: tuple[int, int, int], flips: tuple[int, int, int]
) -> None:
    """The patient's right on the left, the front (axial) or the head at the top; the face on the left (sagittal)."""
    values, affine = landmarks(), RAS.copy()
    for axis, flip in enumerate(flips):
        if flip < 0:
            values = np.flip(values, axis)
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:3, axis] *= -1
    file = save(tmp_path / "v.nii.gz", values.transpose(order), affine[:, [*order, 3]])
    assert read_grid(file).shape == (9, 10, 12) and read_grid(file).spacing == (2, 3, 4)
    np.testing.assert_allclose(read_grid(file).affine, RAS)
    volume = read_volume(file).values
    assert (volume == landmarks()).all()
    bright = {}
    for plane, index in (("axial", 6), ("coronal", 5), ("sagittal", 4)):
        picture = np.asarray(Slice(file, plane, index, "45.5 89").load().image)
        bright[plane] = picture
    # axial: 9 columns of 2 mm and 10 rows of 3 mm, so 15 rows of 2 mm
    assert bright["axial"].shape == (15, 9) and bright["coronal"].shape == (24, 9)
    assert bright["sagittal"].shape == (16, 10)  # 12 rows of 4 mm, 10 columns of 3 mm
    assert bright["axial"][:, 0].argmax() in (6, 7) and bright["axial"][:, 0].max() > 60  # right: row 4 of 10
    assert bright["axial"][0].argmax() == 4 and bright["axial"][0, 4] > 120  # front: first row
    assert bright["coronal"][0].argmax() == 4 and bright["coronal"][0, 4] > 200  # head: first row
    assert bright["sagittal"][:, 0].max() > 120 and bright["sagittal"][0].max() > 200  # face left, head above


def test_slices_are_cut_without_resampling_if_pixels_are_square(tmp_path: Path) -> None:
    values = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4) * 10
    file = save(tmp_path / "v.nii", values, np.eye(4))
    picture = Slice(file, "axial", 1, "115 230").load()
    assert picture.window == "hu 0 230" and picture.spacing == (1, 1) and picture.image.mode == "L"
    expected = [[int(np.round(values[x, y, 1] * 255 / 230)) for x in (1, 0)] for y in (2, 1, 0)]
    assert np.asarray(picture.image).tolist() == expected
    assert isinstance(Slice(file, "axial", 1), Pixels)


def test_the_window_is_of_all_the_volume_without_its_zeros(tmp_path: Path) -> None:
    """Values 1..201 beside many zeros: percentiles 0.5 and 99.5 are 2 and 200."""
    values = np.zeros((10, 10, 10), np.int16)
    values.ravel()[:201] = np.arange(1, 202)
    picture = Slice(save(tmp_path / "v.nii.gz", values, np.eye(4)), "sagittal", 0).load()
    assert picture.window == "percentile 0.5 99.5 -> 2 200"
    made = np.asarray(picture.image)[::-1, ::-1].T  # back to y, z
    assert made[0, :4].tolist() == [0, 0, 1, 3] and made[9, 9] == round(98 * 255 / 198)
    mask = np.zeros((5, 5, 5), np.uint8)
    mask[2] = 1
    shown = Slice(save(tmp_path / "m.nii.gz", mask, np.eye(4)), "sagittal", 2).load()
    assert shown.window == "range 0 1" and shown.image.getextrema() == (255, 255)


def test_voxels_that_are_not_finite_are_black(tmp_path: Path) -> None:
    values = np.full((8, 8, 8), 100.0, np.float32)
    values[:4], values[0, 0, 0], values[1, 1, 1] = 50.0, np.nan, np.inf
    file = save(tmp_path / "v.nii", values, np.eye(4))
    picture = Slice(file, "axial", 0).load()
    assert picture.window == "percentile 0.5 99.5 -> 50 100"
    assert np.asarray(picture.image)[7].tolist() == [255] * 4 + [0] * 4
    assert np.asarray(Slice(file, "axial", 1).load().image)[6, 6] == 0
    hollow = save(tmp_path / "n.nii", np.full((8, 8, 8), np.nan, np.float32))
    with pytest.raises(UserError, match="no finite voxel"):
        Slice(hollow, "axial", 0).load()


def test_scaled_integers_have_their_true_values(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.arange(27, dtype=np.int16).reshape(3, 3, 3), np.eye(4))
    image.header.set_slope_inter(2, -1000)
    nibabel.save(image, tmp_path / "ct.nii.gz")
    assert read_volume(tmp_path / "ct.nii.gz").values[0, 1, 2] == 5 * 2 - 1000


def test_volumes_are_decoded_once_until_they_change(tmp_path: Path) -> None:
    file = save(tmp_path / "v.nii.gz", landmarks())
    first = read_volume(file)
    assert read_volume(file) is first
    save(file, landmarks() * 2)
    assert read_volume(file).values.max() == 180


def test_files_that_hold_no_volume(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 99, (20, 20, 20)).astype(np.int16)
    whole = save(tmp_path / "v.nii.gz", noise).read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(whole[: len(whole) // 2])
    plain = save(tmp_path / "v.nii", noise).read_bytes()
    (tmp_path / "short.nii").write_bytes(plain[:2000])
    (tmp_path / "text.nii").write_text("no volume")
    colours = np.zeros((4, 4, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    for bad, words in (
        (tmp_path / "torn.nii.gz", "damaged"),
        (tmp_path / "short.nii", "damaged"),
        (tmp_path / "text.nii", "no NIfTI file"),
        (tmp_path / "none.nii", "does not exist"),
        (save(tmp_path / "4d.nii", np.ones((3, 3, 3, 2), np.int16)), "holds 3x3x3x2 values"),
        (save(tmp_path / "rgb.nii", colours), "single volume of numbers"),
        (save(tmp_path / "flat.nii", np.full((3, 3, 3), 7, np.int16)), "one value everywhere"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Slice(bad, "axial", 0).load()
        assert "\n" not in str(caught.value)
    for index in (-1, 20):
        with pytest.raises(UserError, match="20 axial slices"):
            Slice(tmp_path / "v.nii", "axial", index).load()
    with pytest.raises(UserError, match="window 'skin'"):
        Slice(tmp_path / "v.nii", "axial", 0, "skin").load()
    one = save(tmp_path / "one.nii", noise[..., None])
    assert Slice(one, "axial", 3).load().image.size == (20, 30)


# --------------------------------------------------------------------------------------------------- real heads


def colin(name: str) -> Path:
    file = Path(os.environ.get("MRICRON", "/usr/share/mricron")) / "templates" / f"{name}.nii.gz"
    if not file.is_file():
        pytest.skip("apt install mricron-data, or MRICRON=FOLDER of it unpacked")
    return file


@pytest.mark.parametrize("plane", PLANES)
def test_named_parts_of_a_real_head_lie_where_they_belong(plane: Plane, tmp_path: Path) -> None:
    """AAL: precentral left 1 and right 2, medial frontal 23 (front), calcarine 43 (back), cerebellum 91 (below)."""
    atlas = read_volume(colin("aal"))

    def centre(part: int) -> tuple[float, float]:
        """(row, column) of a part in the picture of the slice through its middle."""
        mask = (atlas.values == part).astype(np.uint8)
        middle = int(np.argwhere(mask)[:, AXIS[plane]].mean())
        picture = Slice(save(tmp_path / f"{part}.nii", mask, atlas.grid.affine), plane, middle).load()
        row, column = np.argwhere(np.asarray(picture.image) > 127).mean(0)
        return float(row), float(column)

    if plane == "sagittal":
        assert centre(23)[1] < centre(43)[1]  # the face on the left
    else:
        assert centre(2)[1] + 40 < centre(1)[1]  # the patient's right on the left
    front_or_head, back_or_foot = (23, 43) if plane == "axial" else (1, 91)
    assert centre(front_or_head)[0] + 40 < centre(back_or_foot)[0]
    head = Slice(colin("ch2"), plane, 90).load()
    assert head.spacing == (1, 1) and head.window.startswith("percentile")


def test_the_mni_head_is_read() -> None:
    spec = importlib.util.find_spec("nilearn")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("pip install nilearn==0.14.1")
    file = Path(spec.submodule_search_locations[0]) / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    assert read_grid(file).shape == (197, 233, 189) and Slice(file, "axial", 94).load().image.size == (197, 233)
