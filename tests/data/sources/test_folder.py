"""The folder source on a miniature of it: flat, nested, with splits, with all that can be wrong."""

from __future__ import annotations

from pathlib import Path

import PIL.Image
import pytest

from medim.data.sources.base import split_of
from medim.data.sources.folder import FolderOptions, read
from medim.data.studies import Skipped, Study


def put(root: Path, name: str, text: str | bytes | None = "Clear.", suffix: str = ".png") -> Path:
    path = root / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (32, 32), 90).save(path)
    if text is not None:
        path.with_suffix(".txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_authors_layout(tmp_path: Path) -> None:
    """Flat folders of name.jpg or name.png and name.txt, one a dataset."""
    file = put(tmp_path / "MIMIC_CXR", "p10 ä_s5", "﻿Heart\r\nnormal.\n", ".jpg")
    put(tmp_path / "PathGen", "TCGA-1.2_512_1024", "Nests of cells.")
    first, second = read(tmp_path, FolderOptions())
    assert isinstance(first, Study) and isinstance(second, Study)
    assert (first.id, first.patient_id, first.report) == ("MIMIC_CXR/p10 ä_s5", first.id, "Heart\r\nnormal.")
    assert (first.images[0].modality, first.images[0].pixels) == ("xray", file)
    assert (second.id, second.images[0].modality) == ("PathGen/TCGA-1.2_512_1024", "pathology")
    assert first.split == split_of(first.id) and first.source == "folder"


def test_splits_and_patients_by_folder(tmp_path: Path) -> None:
    for name in ("train/p1/a", "val/p2/a", "Test/p3/a", "p4/a", "p4/b"):
        put(tmp_path, name)
    studies = list(read(tmp_path, FolderOptions(modality="ct", patient="folder")))
    assert [(s.id, s.patient_id, s.split) for s in studies if isinstance(s, Study)] == [
        ("Test/p3/a", "Test/p3", "test"),
        ("p4/a", "p4", split_of("p4")),
        ("p4/b", "p4", split_of("p4")),
        ("train/p1/a", "train/p1", "train"),
        ("val/p2/a", "val/p2", "validation"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "suffix", "reason"),
    [
        ("mri/a", None, ".png", "a.txt is missing"),
        ("mri/a", " \n", ".png", "a.txt is empty"),
        ("other/a", "Clear.", ".png", "which modality"),
    ],
)
def test_what_is_no_pair(name: str, text: str | None, suffix: str, reason: str, tmp_path: Path) -> None:
    put(tmp_path, name, text, suffix)
    (found,) = read(tmp_path, FolderOptions())
    assert isinstance(found, Skipped) and (found.id, found.file) == (name, f"{name}{suffix}") and reason in found.reason


def test_two_pictures_of_one_name_and_a_text_alone(tmp_path: Path) -> None:
    for suffix in (".jpg", ".png"):
        put(tmp_path, "mri/a", "Clear.", suffix)
    (tmp_path / "mri" / "b.txt").write_text("Alone.")
    one, two, alone = read(tmp_path, FolderOptions())
    assert isinstance(one, Study) and one.images[0].pixels == tmp_path / "mri" / "a.jpg"
    assert two == Skipped("mri/a", "", "a study of this id came before")
    assert alone == Skipped("mri/b", "mri/b.txt", "no picture of this name beside it")
