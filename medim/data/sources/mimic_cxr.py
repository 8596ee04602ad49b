"""MIMIC-CXR as PhysioNet publishes it: JPEG (mimic-cxr-jpg 2.x) or DICOM (mimic-cxr 2.x), with its reports and splits.

Source: Johnson et al., "MIMIC-CXR" (2019, arXiv 1901.07042). The two tables are read as streams and joined by study; no
folder is listed, so that 227,000 studies are listed in seconds where the reports are on a fast disk.
"""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterator
from pathlib import Path

from medim.config import options
from medim.data.sources.base import Source, read_text
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError

SPLITS = {"train": "train", "validate": "validation", "test": "test"}
TABLES = {"split": ("dicom_id", "study_id", "subject_id", "split"), "metadata": ("dicom_id", "ViewPosition")}


@options
class MimicCxrOptions:
    """Which images, and where the reports are.

    Attributes:
        views: of ViewPosition, in the order in which a study's images are wanted; all for every image.
        per_image: true makes a study of each image, as most papers do; false keeps the images of a study together.
        reports: folder that holds the tree of reports (files/p10/p10000032/s50414267.txt), if it is not ROOT.
    """

    views: tuple[str, ...] = ("PA", "AP")
    per_image: bool = False
    reports: str = ""


def read(root: Path, choice: MimicCxrOptions) -> Iterator[Study | Skipped]:
    """The studies by subject and study, each with the images of the views.

    Raises:
        UserError: a table is missing or lacks a column.
    """
    views = {row["dicom_id"]: row["ViewPosition"].upper() for row in _rows(root, "metadata")}
    studies: dict[tuple[str, str, str], list[str]] = {}
    for row in _rows(root, "split"):
        key = (row["subject_id"], row["study_id"], row["split"])
        studies.setdefault(key, []).append(row["dicom_id"])
    reports = next((folder for folder in _report_roots(root, choice) if (folder / "files").is_dir()), root)
    for (subject, study, split), dicoms in sorted(studies.items()):
        yield from _study(root, reports, choice, (subject, study, split), sorted(dicoms), views)


def _study(
    root: Path,
    reports: Path,
    choice: MimicCxrOptions,
    key: tuple[str, str, str],
    dicoms: list[str],
    views: dict[str, str],
) -> Iterator[Study | Skipped]:
    subject, study, split = key
    folder = Path("files", f"p{subject[:2]}", f"p{subject}", f"s{study}")
    name = f"s{study}"
    if split not in SPLITS:
        yield Skipped(name, "", f"the split table says {split!r}; known are {', '.join(SPLITS)}")
        return
    kept = [d for d in dicoms if choice.views == ("all",) or views.get(d, "") in choice.views]
    if choice.views != ("all",):
        kept.sort(key=lambda d: (choice.views.index(views[d]), d))
    if not kept:
        yield Skipped(name, folder.as_posix(), f"no image of the views {', '.join(choice.views)}")
        return
    try:
        report = read_text(reports / folder.with_suffix(".txt"))
    except OSError:
        yield Skipped(name, folder.with_suffix(".txt").as_posix(), "the report is missing")
        return
    files = {d: next((p for s in (".jpg", ".dcm") if (p := root / folder / f"{d}{s}").is_file()), None) for d in kept}
    images: list[tuple[str, Image]] = []
    for dicom in kept:
        file = files[dicom]
        if file is None:
            yield Skipped(name, (folder / f"{dicom}.jpg").as_posix(), "the image is missing")
        else:
            images.append((dicom, Image("xray", file, views.get(dicom, ""))))
    if images and choice.per_image:
        for dicom, image in images:
            yield Study(f"{name}-{dicom}", f"p{subject}", (image,), report, split=SPLITS[split], source="mimic-cxr")
    elif images:
        both = tuple(image for _, image in images)
        yield Study(name, f"p{subject}", both, report, split=SPLITS[split], source="mimic-cxr")


def _report_roots(root: Path, choice: MimicCxrOptions) -> Iterator[Path]:
    """Where the tree of reports may be: given, in a folder of its own as it unpacks, or among the images."""
    if choice.reports:
        if not Path(choice.reports).is_dir():
            raise UserError(f"--reports {choice.reports}: no such folder")
        yield Path(choice.reports)
    yield root / "mimic-cxr-reports"
    yield root


def _rows(root: Path, name: str) -> Iterator[dict[str, str]]:
    """Rows of a table, which may be gzipped."""
    base = root / f"mimic-cxr-2.0.0-{name}.csv"
    for path in (base.with_name(base.name + ".gz"), base):
        if path.is_file():
            with _open(path) as file:
                rows = csv.DictReader(file)
                lacking = [column for column in TABLES[name] if column not in (rows.fieldnames or ())]
                if lacking:
                    there = ", ".join(rows.fieldnames or ("none",))
                    raise UserError(f"{path}: no column {lacking[0]}; there are {there}")
                yield from rows
            return
    raise UserError(f"{base}(.gz): no such file; ROOT must hold the tables of mimic-cxr-jpg beside files/")


def _open(path: Path) -> io.TextIOWrapper:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


SOURCE = Source(
    read,
    MimicCxrOptions,
    "MIMIC-CXR: JPEGs or DICOMs, reports, official splits",
    "ROOT/files/p10/p10000032/s50414267/*.jpg or *.dcm, ROOT/mimic-cxr-2.0.0-split.csv.gz, "
    "ROOT/mimic-cxr-2.0.0-metadata.csv.gz, and the reports as ROOT/files/p10/p10000032/s50414267.txt or in "
    "ROOT/mimic-cxr-reports/",
)
