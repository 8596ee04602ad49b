"""Text by an atlas: true of the slice, read back, on another grid too."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest

from medim.data.atlas import Atlas, read_report, region_dice
from medim.errors import UserError
from medim.pictures.nifti import read_grid


def labels(folder: Path, affine: np.ndarray | None = None) -> Path:
    """Left (small x) and right of a region, and one in the middle high up."""
    values = np.zeros((12, 10, 9), np.uint8)
    values[1:5, 2:8, 1:8], values[7:11, 2:8, 3:8], values[5:7, 2:8, 7:8] = 1, 2, 7
    file = folder / "atlas.nii.gz"
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), file)
    (folder / "atlas.nii.txt").write_text("1 Frontal_Sup_L 2001\n2 Frontal_Sup_R 2002\n7 Vermis_3 9\n\n")
    return file


def test_what_is_seen_is_told(tmp_path: Path) -> None:
    file = labels(tmp_path)
    sections = Atlas.read(file).on(read_grid(file))
    assert sections.report("axial", 1) == "Axial section, lower third. Seen: left frontal superior."
    assert sections.report("axial", 4) == "Axial section, middle third. Seen: frontal superior."
    assert sections.report("axial", 7) == "Axial section, upper third. Seen: frontal superior, vermis 3."
    assert sections.report("axial", 8) == "Axial section, upper third. No named region."
    assert sections.report("coronal", 3) == "Coronal section, posterior third. Seen: frontal superior, vermis 3."
    assert sections.report("sagittal", 2) == sections.report("sagittal", 9).replace("right ", "")
    assert sections.report("sagittal", 5) == "Sagittal section, median third. Seen: vermis 3."
    assert {sections.report("sagittal", x)[:32] for x in (1, 10)} == {"Sagittal section, lateral third."}


def test_an_atlas_on_another_grid(tmp_path: Path) -> None:
    file = labels(tmp_path)
    fine, values = tmp_path / "fine.nii.gz", np.ones((24, 20, 18), np.float32)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([0.5, 0.5, 0.5, 1.0])), fine)
    sections = Atlas.read(file).on(read_grid(fine))
    assert sections.labels.shape == (24, 20, 18) and set(np.unique(sections.labels)) == {0, 1, 2, 7}
    assert sections.report("axial", 8) == "Axial section, middle third. Seen: frontal superior."
    flipped = tmp_path / "flipped.nii.gz"  # stored the other way round: the same millimetres, the same text
    affine = np.diag([-1.0, 1, 1, 1])
    affine[0, 3] = 11
    nibabel.save(nibabel.Nifti1Image(np.ones((12, 10, 9)), affine), flipped)
    assert Atlas.read(file).on(read_grid(flipped)).report("axial", 1).endswith("left frontal superior.")


def test_reports_are_read_strictly() -> None:
    told = read_report("Axial section, upper third. Seen: insula, left frontal superior.")
    assert (told.plane, told.level) == ("axial", "upper")
    assert told.regions == {"left insula", "right insula", "left frontal superior"}
    assert read_report("Axial section, upper third. No named region.").level == "upper"
    assert read_report("The lungs are clear.") == read_report("")
    a, b = "Axial section, upper third. Seen: insula.", "Coronal section, middle third. Seen: left insula, vermis 3."
    assert region_dice(a, a) == 1 and region_dice(a, "nothing") == 0 == region_dice("nothing", a)
    assert region_dice(a, b) == pytest.approx(2 * 1 / (2 + 3)) and region_dice("", "nothing") == 1


def test_atlases_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.nii.gz: no such file"):
        Atlas.read(tmp_path / "none.nii.gz")
    file = labels(tmp_path)
    (tmp_path / "atlas.nii.txt").rename(tmp_path / "names.txt")
    with pytest.raises(UserError, match=r"atlas.nii.txt is not beside it"):
        Atlas.read(file)
    (tmp_path / "atlas.nii.txt").write_text("names\n")
    with pytest.raises(UserError, match="no line of a label"):
        Atlas.read(file)
