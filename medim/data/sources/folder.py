"""A folder of pictures with a text of the same name beside each: as the MeDiM authors have it, and most people."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from medim.config import options
from medim.data.sources.base import Source, read_text, split_of, unique
from medim.data.studies import Image, Skipped, Study

PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".dcm")
SPLITS = {
    "train": "train", "training": "train", "val": "validation", "valid": "validation", "validate": "validation",
    "validation": "validation", "test": "test", "testing": "test",
}  # fmt: skip
NAMED = {"mimic": "xray", "xray": "xray", "cxr": "xray", "pathgen": "pathology", "pathology": "pathology"}


@options
class FolderOptions:
    """What a folder does not say of itself.

    Attributes:
        modality: of all pictures; empty takes it from the names of folders (mimic, cxr, xray, pathgen, pathology,
            ct, mri), of which each picture must then have one.
        patient: what is one patient: each file, or the folder a file is in.
    """

    modality: Literal["", "xray", "pathology", "ct", "mri"] = ""
    patient: Literal["file", "folder"] = "file"


def read(root: Path, choice: FolderOptions) -> Iterator[Study | Skipped]:
    """Pictures and texts in the order of their paths.

    The split is that of a folder on the way that is called train, val or test, else by hash of the patient.
    """
    return unique(_pairs(root, choice))


def _pairs(root: Path, choice: FolderOptions) -> Iterator[Study | Skipped]:
    for name, folders, names in os.walk(root):
        folders.sort()
        folder, listed = Path(name), sorted(names)
        texts = {Path(name).stem: name for name in listed if name.lower().endswith(".txt")}
        pictured = {Path(name).stem for name in listed if Path(name).suffix.lower() in PICTURES}
        for name in listed:
            path = folder / name
            stem, suffix = path.stem, path.suffix.lower()
            place = path.relative_to(root)
            id = place.with_suffix("").as_posix()
            if suffix in PICTURES:
                yield _pair(root, folder, path, texts.get(stem), id, choice)
            elif suffix == ".txt" and stem not in pictured:
                yield Skipped(id, place.as_posix(), "no picture of this name beside it")


def _pair(root: Path, folder: Path, path: Path, text: str | None, id: str, choice: FolderOptions) -> Study | Skipped:
    place = path.relative_to(root)
    if text is None:
        return Skipped(id, place.as_posix(), f"{path.stem}.txt is missing")
    above = [part.lower() for part in (*place.parts[:-1][::-1], root.name)]
    modality: str = choice.modality or next((found for part in above if (found := _modality(part))), "")
    if not modality:
        return Skipped(
            id, place.as_posix(), "which modality? give --modality, or name a folder xray, pathology, ct, mri"
        )
    report = read_text(folder / text).strip()
    if not report:
        return Skipped(id, place.as_posix(), f"{text} is empty")
    patient = id if choice.patient == "file" else place.parent.as_posix()
    split = next((SPLITS[part] for part in above if part in SPLITS), split_of(patient))
    return Study(id, patient, (Image(modality, path),), report, split=split, source="folder")


def _modality(part: str) -> str:
    if part in ("ct", "mri"):
        return part
    return next((modality for name, modality in NAMED.items() if name in part), "")


SOURCE = Source(
    read,
    FolderOptions,
    "pictures with a text of the same name beside each",
    "ROOT/[train|val|test/]name.png (jpg, tif, bmp, dcm), ROOT/.../name.txt; flat or nested",
)
