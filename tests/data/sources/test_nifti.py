"""Volumes to slices: the trees of BraTS, IXI and paired CT and MRI in miniature, and what does not fit them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medim.data.sources import SOURCES
from medim.data.sources.nifti import NiftiOptions, parse_name, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError
from medim.pictures import read_picture
from medim.pictures.nifti import Slice


def write(file: Path, bright: range = range(2, 8), value: int = 100, affine: Any = None, size: int = 10) -> Path:
    """A head of `size` voxels a side: a cube of `value`, of which the axial slices `bright` are seen."""
    values = np.zeros((size, size, size), np.int16)
    values[2:8, 2:8, bright.start : bright.stop] = np.arange(36).reshape(6, 6, 1) + value
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), file)
    return file


def listed(root: Path, **given: Any) -> tuple[list[Study], dict[str, str]]:
    """Studies, and the reason of every file that was skipped."""
    records = list(read(root, NiftiOptions(**given)))
    assert list(read(root, NiftiOptions(**given))) == records
    return (
        [one for one in records if isinstance(one, Study)],
        {one.file: one.reason for one in records if isinstance(one, Skipped)},
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("BraTS20_Training_001/BraTS20_Training_001_t1ce.nii.gz", ("BraTS20_Training_001", "t1ce")),
        ("x/BraTS-GLI-00005-100-t2f.nii.gz", ("BraTS-GLI-00005-100", "t2f")),
        ("IXI-PD/IXI012-HH-1211-PD.nii.gz", ("IXI012-HH-1211", "pd")),
        ("Task1/brain/1BA001/mr.nii.gz", ("1BA001", "mr")),
        ("sub-01/ses-2/anat/sub-01_ses-2_T1w.nii", ("sub-01_ses-2", "t1w")),
        ("t1.nii", ("", "t1")),
        ("brain.nii.gz", ("", "")),
    ],
)
def test_names_tell_subject_and_sequence(name: str, told: tuple[str, str]) -> None:
    assert parse_name(name) == told


@pytest.mark.parametrize("words", [("_t1", "_t1ce", "_t2", "_flair"), ("-t1n", "-t1c", "-t2w", "-t2f")])
def test_brats(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Slices 2 to 7 hold 36 of 100 pixels; the others are empty and left out."""
    for subject in ("BraTS-GLI-00002-000", "BraTS-GLI-00002-001", "BraTS-GLI-00001-000"):
        for word in words:
            write(tmp_path / subject / f"{subject}{word}.nii.gz")
        write(tmp_path / subject / f"{subject}{words[0][0]}seg.nii.gz")
    (tmp_path / "BraTS-GLI-00001-000" / "report.txt").write_text("A tumour.\n")
    studies, skipped = listed(tmp_path)
    assert not skipped and len(studies) == 18
    first = studies[0]
    assert first.id == "BraTS-GLI-00001-000-axial-002" and first.patient_id == "BraTS-GLI-00001"
    assert [(i.modality, i.view) for i in first.images] == [
        ("mri", "t1 axial"), ("mri", "t1ce axial"), ("mri", "t2 axial"), ("mri", "flair axial"),
    ]  # fmt: skip
    file = tmp_path / "BraTS-GLI-00001-000" / f"BraTS-GLI-00001-000{words[3]}.nii.gz"
    assert first.images[3].pixels == Slice(file, "axial", 2) and first.images[3].spacing == (1, 1)
    assert [s.report for s in studies] == ["A tumour."] * 6 + [""] * 12
    assert {s.patient_id for s in studies[6:]} == {"BraTS-GLI-00002"} and len({s.split for s in studies[6:]}) == 1


def test_ixi_and_grids_that_differ(tmp_path: Path) -> None:
    moved = np.eye(4)
    moved[0, 3] = 3.0
    write(tmp_path / "IXI-T1" / "IXI002-Guys-0828-T1.nii.gz", affine=moved)
    for word in ("T2", "PD"):
        write(tmp_path / f"IXI-{word}" / f"IXI002-Guys-0828-{word}.nii.gz")
    write(tmp_path / "IXI-T2" / "old" / "IXI002-Guys-0828-T2.nii.gz")
    write(tmp_path / "IXI-MRA" / "IXI002-Guys-0828-MRA.nii.gz")
    studies, skipped = listed(tmp_path)
    assert [[i.view for i in s.images] for s in studies] == [["t2 axial", "pd axial"]] * 6
    assert {name.split("/")[-2]: reason.split(" (")[0].split(":")[0] for name, reason in skipped.items()} == {
        "IXI-T1": "it lies on another grid than others of IXI002-Guys-0828",
        "old": "subject IXI002-Guys-0828 has such a volume already",
        "IXI-MRA": "the name tells no sequence",
    }


def test_paired_ct_and_mri(tmp_path: Path) -> None:
    write(tmp_path / "1BA001" / "ct.nii.gz", value=0)
    write(tmp_path / "1BA001" / "mr.nii.gz")
    write(tmp_path / "1BA001" / "mask.nii.gz")
    studies, skipped = listed(tmp_path, plane="coronal", every=4, content=0, window="brain")
    assert not skipped and [s.id for s in studies] == [f"1BA001-coronal-00{k}" for k in (1, 5, 9)]
    mri, ct = studies[0].images
    assert (mri.modality, mri.view, ct.modality, ct.view) == ("mri", "coronal", "ct", "brain coronal")
    assert isinstance(mri.pixels, Slice) and isinstance(ct.pixels, Slice)
    assert (mri.pixels.window, ct.pixels.window) == (None, "brain")
    assert read_picture(ct.pixels).window == "hu 0 80"


def test_content_counts_what_is_seen(tmp_path: Path) -> None:
    """Of sagittal slices, 2 to 7 show 6 rows of 5 in 10 x 10: 30 %."""
    write(tmp_path / "a_t1.nii.gz", range(1, 6))
    for least, wanted in ((0.0, range(10)), (0.3, range(2, 8)), (0.31, range(0))):
        studies, _ = listed(tmp_path, plane="sagittal", content=least)
        assert [s.id for s in studies] == [f"a-sagittal-{k:03d}" for k in wanted]


def test_a_pattern_for_any_names(tmp_path: Path) -> None:
    write(tmp_path / "T1" / "head ä 7.nii.gz")
    write(tmp_path / "T2" / "head ä 7.nii.gz")
    (tmp_path / "T2" / "head ä 7.txt").write_text("beside it")
    studies, skipped = listed(tmp_path, pattern=r"(?P<sequence>T\d)/(?P<subject>head .*)\.nii\.gz", every=3)
    assert not skipped and [s.id for s in studies] == ["head ä 7-axial-003", "head ä 7-axial-006"]
    assert [i.view for i in studies[0].images] == ["t1 axial", "t2 axial"] and studies[0].report == "beside it"


def test_thick_slices_are_seen_in_their_true_shape(tmp_path: Path) -> None:
    write(tmp_path / "a_t1.nii.gz", affine=np.diag([1.0, 1.0, 5.0, 1.0]))
    studies, _ = listed(tmp_path, plane="sagittal")
    image = studies[0].images[0]
    assert image.spacing == (1, 1) == read_picture(image.pixels).spacing
    assert read_picture(image.pixels).image.size == (10, 50)


def test_damaged_volumes_are_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "good_t1.nii.gz").read_bytes()
    (tmp_path / "torn_t1.nii.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text_t1.nii").write_text("no volume")
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), tmp_path / "nan_t1.nii")
    write(tmp_path / "half_t2.nii.gz")
    (tmp_path / "half_t1.nii.gz").write_bytes(b"")
    studies, skipped = listed(tmp_path)
    assert {s.patient_id for s in studies} == {"good", "half"}
    assert {name: reason.split(":")[0] for name, reason in skipped.items()} == {
        "half_t1.nii.gz": "the file cannot be read as NIfTI",
        "nan_t1.nii": "the file holds no finite voxel (NaN everywhere)",
        "text_t1.nii": "the file cannot be read as NIfTI",
        "torn_t1.nii.gz": "the file cannot be read as NIfTI",
    }
    with pytest.raises(UserError, match="no such folder"):
        listed(tmp_path / "none")


def test_options_are_checked() -> None:
    for given, words in (
        ({"window": "liver"}, "window 'liver'"),
        ({"every": 0}, "every=0"),
        ({"content": 1.0}, "content=1"),
        ({"pattern": "(?P<subject>.*"}, "no regular expression"),
        ({"pattern": "(?P<subject>.*)"}, "name its groups"),
        ({"test": 0.5, "validation": 0.5}, "leave some"),
    ):
        with pytest.raises(UserError, match=words):
            NiftiOptions(**given)  # type: ignore[arg-type]
    assert SOURCES["nifti"].read is read and SOURCES["nifti"].options is NiftiOptions


def test_slabs_are_held_out_with_gaps(tmp_path: Path) -> None:
    """Of 40 slices: a slab of 4 in the middle of each 20, by turns test and validation, 3 on both sides left out."""
    write(tmp_path / "a" / "t1.nii.gz", range(0, 40), size=40)
    studies, _ = listed(tmp_path, slabs=20, slab=4, gap=3, content=0)
    split = {int(s.id[-3:]): s.split for s in studies}
    assert [n for n in range(40) if n not in split] == [5, 6, 7, 12, 13, 14, 25, 26, 27, 32, 33, 34]
    assert [n for n, s in split.items() if s == "test"] == [8, 9, 10, 11]
    assert [n for n, s in split.items() if s == "validation"] == [28, 29, 30, 31]
    mirrored, _ = listed(tmp_path, slabs=20, slab=4, gap=3, content=0, plane="sagittal")
    split = {int(s.id[-3:]): s.split for s in mirrored}
    assert all(split.get(n) == split.get(39 - n) for n in range(40)) and split[8] == split[31] == "test"
    write(tmp_path / "b" / "t1.nii.gz")
    both, _ = listed(tmp_path, held_out=("b",), plane="all")
    assert {(s.patient_id, s.split) for s in both} == {("a", "train"), ("b", "test")}
    assert {s.id.split("-")[1] for s in both} == {"axial", "coronal", "sagittal"}
    with pytest.raises(UserError, match="held_out=c: no such subject; there are a, b"):
        listed(tmp_path, held_out=("c",))
    with pytest.raises(UserError, match="leaves none"):
        NiftiOptions(slabs=8, slab=4, gap=2)


def test_volumes_of_one_space_are_resampled_and_others_only_when_forced(tmp_path: Path) -> None:
    def save(word: str, affine: np.ndarray, code: int, size: int) -> None:
        values = np.zeros((size, size, size), np.float32)
        values[size // 4 : -size // 4] = np.linspace(50, 150, size)
        image = nibabel.Nifti1Image(values, affine)
        image.set_sform(affine, code)
        nibabel.save(image, tmp_path / f"s_{word}.nii.gz")

    save("t1", np.eye(4), 4, 20)
    save("t2", np.diag([2.0, 2.0, 2.0, 1.0]), 4, 10)
    save("flair", np.diag([4.0, 4.0, 4.0, 1.0]), 2, 5)
    studies, skipped = listed(tmp_path)
    assert [i.view for i in studies[0].images] == ["t1 axial", "t2 axial"] and set(skipped) == {"s_flair.nii.gz"}
    assert "take it as it lies with --resample force" in skipped["s_flair.nii.gz"]
    pictures = [read_picture(image.pixels) for image in studies[8].images]
    assert pictures[0].image.size == pictures[1].image.size == (20, 20) and pictures[1].window.endswith(", resampled")
    assert [len(s.images) for s in listed(tmp_path, resample="force")[0][:1]] == [3]
    assert [len(s.images) for s in listed(tmp_path, resample="no")[0][:1]] == [1]


def test_an_atlas_tells_of_slices_that_have_no_text(tmp_path: Path) -> None:
    write(tmp_path / "a_t1.nii.gz", range(0, 10))
    write(tmp_path / "b_t1.nii.gz", range(0, 10))
    (tmp_path / "b.txt").write_text("Its own.")
    labels = np.full((10, 10, 10), 3, np.uint8)
    folder = tmp_path / "atlas"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(labels, np.eye(4)), folder / "x_mask.nii")
    (folder / "x_mask.nii.txt").write_text("3 Insula_L 1\n")
    studies, skipped = listed(tmp_path, atlas=str(folder / "x_mask.nii"))
    assert not skipped
    assert {s.report for s in studies if s.patient_id == "a"} == {
        f"Axial section, {third} third. Seen: left insula." for third in ("lower", "middle", "upper")
    }
    assert {s.report for s in studies if s.patient_id == "b"} == {"Its own."}
    scan = nibabel.load(tmp_path / "a_t1.nii.gz")
    scan.set_sform(np.eye(4), 1)
    nibabel.save(scan, tmp_path / "a_t1.nii.gz")
    studies, skipped = listed(tmp_path, atlas=str(folder / "x_mask.nii"))
    assert "in its scanner's space" in skipped["a_t1.nii.gz"] and {s.patient_id for s in studies} == {"b"}
    assert len({s.patient_id for s in listed(tmp_path, atlas=str(folder / "x_mask.nii"), resample="force")[0]}) == 2
