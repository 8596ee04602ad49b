"""Open-i, the chest X-rays of Indiana University: reports in XML, pictures in PNG (NLMCXR).

Source: Demner-Fushman et al., "Preparing a collection of radiology examinations for distribution and retrieval" (JAMIA
2016). It has no official splits; each report is of another patient.
"""

from __future__ import annotations

import csv
import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from medim.config import options
from medim.data.packaged import file_of
from medim.data.sources.base import Source, check_shares, files_under, split_of, unique
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError

REPORTS = "NLMCXR_reports.tgz"
VIEWS = "nlmcxr_dicom_metadata.csv.gz"  # torchxrayvision's, of the DICOM headers
PICTURES = (".png", ".jpg", ".jpeg")
LATERAL = ("LL", "RL", "LARGE LATERAL")


@options
class OpenIOptions:
    """Where the reports are, and which images are taken.

    Attributes:
        reports: folder of XML files or NLMCXR_reports.tgz; empty looks in ROOT, then in an installed torchxrayvision.
        views: which are taken: PA, AP or LATERAL, as the DICOM headers say (a table of torchxrayvision or in ROOT); all
            takes every image, also the third of them that no header names; none takes the reports alone, and no ROOT.
        validation: share of the patients that is held out for it, by the hash of their numbers.
        test: likewise the share of the test split.
    """

    reports: str = ""
    views: tuple[str, ...] = ("all",)
    validation: float = 0.1
    test: float = 0.1


@dataclass(frozen=True)
class _Report:
    id: str
    images: tuple[str, ...]
    text: str


def read(root: Path | None, choice: OpenIOptions) -> Iterator[Study | Skipped]:
    """The reports by number, each with its images; those without an image are named.

    Without `root` the reports are those of an installed torchxrayvision, which has no images.

    Raises:
        UserError: no reports or no images are found, a damaged archive, views are asked for and no table is there.
    """
    check_shares(choice.validation, choice.test)
    if choice.views == ("none",):
        return unique(_texts(root, choice))
    if root is None:
        raise UserError("open-i: give the ROOT of its images, or --views none to take the reports alone")
    pictures = {path.stem: path for path in files_under(root) if path.suffix.lower() in PICTURES}
    if not pictures:
        raise UserError(f"{root}: no PNG in it; unpack NLMCXR_png.tgz of openi.nlm.nih.gov/faq there")
    views = _views(root)
    if choice.views != ("all",) and not views:
        raise UserError(
            f"--views {','.join(choice.views)}: {VIEWS} is not in {root}; it comes with torchxrayvision: "
            "pip install --no-deps torchxrayvision==1.5.7"
        )
    return unique(_studies(root, pictures, views, choice))


def _texts(root: Path | None, choice: OpenIOptions) -> Iterator[Study | Skipped]:
    for one in _numbered(root, choice):
        split = "" if isinstance(one, Skipped) else split_of(one.id, choice.validation, choice.test)
        yield one if isinstance(one, Skipped) else Study(one.id, one.id, (), one.text, split=split, source="open-i")


def _numbered(root: Path | None, choice: OpenIOptions) -> list[_Report | Skipped]:
    """The reports by number."""
    found = list(_reports(root, choice))
    number = {one.id: [int(n) for n in re.findall(r"\d+", one.id)] for one in found}
    return sorted(found, key=lambda one: (number[one.id], one.id))


def _studies(
    root: Path, pictures: dict[str, Path], views: dict[str, str], choice: OpenIOptions
) -> Iterator[Study | Skipped]:
    for one in _numbered(root, choice):
        if isinstance(one, Skipped):
            yield one
            continue
        wanted = [name for name in one.images if choice.views == ("all",) or views.get(name, "") in choice.views]
        if not wanted:
            reason = f"no image of the views {', '.join(choice.views)}" if one.images else "it names no image"
            yield Skipped(one.id, "", reason)
            continue
        for name in wanted:
            if name not in pictures:
                yield Skipped(one.id, f"{name}.png", "the image is missing")
        images = tuple(Image("xray", pictures[name], views.get(name, "")) for name in wanted if name in pictures)
        if images:
            split = split_of(one.id, choice.validation, choice.test)
            yield Study(one.id, one.id, images, one.text, split=split, source="open-i")


def _reports(root: Path | None, choice: OpenIOptions) -> Iterator[_Report | Skipped]:
    given = Path(choice.reports) if choice.reports else None
    if given is not None and not given.exists():
        raise UserError(f"--reports {given}: no such folder or file")
    folder = given or root or Path(REPORTS)
    files = [path for path in files_under(folder) if path.suffix.lower() == ".xml"] if folder.is_dir() else []
    if files:
        for path in files:
            yield _report(path.read_bytes(), path.relative_to(folder).as_posix())
        return
    archive = folder
    if folder.is_dir():
        archive = next((path for path in files_under(folder) if path.name == REPORTS), folder / REPORTS)
    if not archive.is_file():
        packaged = file_of("torchxrayvision", f"data/{REPORTS}") if given is None else None
        if packaged is None:
            raise UserError(
                f"{folder}: no reports (*.xml or {REPORTS}); fetch the archive from openi.nlm.nih.gov/faq, or install "
                "the one of torchxrayvision: pip install --no-deps torchxrayvision==1.5.7"
            )
        archive = packaged
    try:
        with tarfile.open(archive) as members:
            for member in members:
                if member.name.endswith(".xml") and (file := members.extractfile(member)) is not None:
                    yield _report(file.read(), member.name)
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{archive}: the archive is damaged or incomplete ({error})") from error


def _report(raw: bytes, name: str) -> _Report | Skipped:
    """The sections of a report under their headings, and the names of its images."""
    try:
        tree = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        return Skipped(Path(name).stem, name, f"not XML ({error})")
    uid = tree.find("uId")
    id = uid.get("id", "") if uid is not None else ""
    images = tuple(image.get("id", "") for image in tree.iter("parentImage"))
    texts = ((part.get("Label", ""), " ".join((part.text or "").split())) for part in tree.iter("AbstractText"))
    text = "\n".join(f"{label}: {words}" for label, words in texts if words)
    return _Report(id, images, text) if id else Skipped(Path(name).stem, name, "no uId in it")


def _views(root: Path) -> dict[str, str]:
    """The view of each image whose header has one."""
    table = root / VIEWS if (root / VIEWS).is_file() else file_of("torchxrayvision", f"data/{VIEWS}")
    if table is None:
        return {}
    with gzip.open(table, "rt", encoding="utf-8", newline="") as file:
        found = {row["imageid"]: row["View Position"].strip() for row in csv.DictReader(file)}
    return {name: "LATERAL" if view in LATERAL else view for name, view in found.items() if view}


SOURCE = Source(
    read,
    OpenIOptions,
    "Open-i: the chest X-rays of Indiana University, reports in XML",
    "ROOT/NLMCXR_png/*.png and ROOT/ecgen-radiology/*.xml or ROOT/NLMCXR_reports.tgz\n"
    "or no ROOT and --views none: the reports alone, of an installed torchxrayvision",
    packaged=True,
)
