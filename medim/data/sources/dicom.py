"""A tree of DICOM files, as an archive exports it: studies by their headers, whatever the files are called.

Nothing of a header that could name a patient leaves this module: patients and studies are numbers in the order of
their first files, views come from a fixed list of words, and reasons quote no header. The patient's id decides the
split by its hash and is forgotten. Paths do appear in the skip list, and reports are taken as they are.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medim.config import options
from medim.data.sources.base import Source, check_shares, files_under, read_text, split_of
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.pictures.dicom import DAMAGED, Frame, find, is_dicom, quiet, read_header, spacing_of
from medim.pictures.picture import Spacing, squared_spacing
from medim.pictures.windows import HU, parse_window

if TYPE_CHECKING:
    from pydicom import Dataset

ABOUT = "a tree of DICOM files: CR and DX, CT, MR; reports from .txt files beside them"
LAYOUT = """any folders, any names, with or without .dcm; a file is DICOM if its content says so
  ROOT/A/1.dcm  ROOT/A/1.txt         a report beside an image of the study, with the same stem, or
  ROOT/A/...    ROOT/A/report.txt    the only .txt of a folder that holds one study, or
  ROOT/A/...    ROOT/A.txt           named like that folder"""
MODALITY = {"CR": "xray", "DX": "xray", "CT": "ct", "MR": "mri"}
VIEWS = {"AP": "AP", "PA": "PA", "LATERAL": "LATERAL", "LAT": "LATERAL", "LL": "LATERAL", "RL": "LATERAL"}
OTHERS = {
    "SR": "a structured report is not read: put its text beside the image as .txt",
    "US": "ultrasound is not one of the modalities",
    "MG": "mammography is not one of the modalities",
    "NM": "nuclear medicine is not one of the modalities",
    "PT": "PET is not one of the modalities",
    "SEG": "a segmentation is no image",
}
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"  # storage classes of secondary captures
SEQUENCES = (
    ("", r"t2\s*(\*|star)|swi|dwi|adc|trace|localizer|scout|survey"),  # named like others, and none of them
    ("flair", r"flair|tirm|dark.?fluid"),
    ("t1ce", r"t1.*(\bgd|gad|contrast|\bpost|\bce\b|\+ ?c)|t1ce|t1c\b"),
    ("t1", r"t1|mprage|spgr|bravo"),
    ("t2", r"t2"),
    ("pd", r"\bpd|proton"),
)
PLANES = ("sagittal", "coronal", "axial")  # by the axis that the plane's normal is nearest to
TAGS = [
    *("Modality", "ImageType", "SOPClassUID", "BurnedInAnnotation", "PatientID", "IssuerOfPatientID"),
    *("StudyInstanceUID", "SeriesInstanceUID"),
    *("SOPInstanceUID", "InstanceNumber", "ViewPosition", "SeriesDescription", "ProtocolName", "SequenceName"),
    *("ContrastBolusAgent", "ImageOrientationPatient", "ImagePositionPatient", "PixelSpacing", "ImagerPixelSpacing"),
    *("Rows", "Columns", "NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]


@options
class DicomOptions:
    """Options of source dicom.

    Attributes:
        window: of CT: lung, soft, brain, bone, or "centre width" in HU; others are shown as their files ask.
        frames: of a CT or MR series, be it many files or one with many frames: "middle" is one image a series, all of
            them in one study; "all" or every k-th make each a study of its own.
        validation: share of the patients that is held out for it, by the hash of their id.
        test: likewise the share of the test split.
    """

    window: str = "soft"
    frames: Literal["middle", "all"] | int = "middle"
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        parse_window(self.window)
        check_shares(self.validation, self.test)
        if isinstance(self.frames, int) and self.frames < 1:
            raise UserError(f"frames={self.frames}: middle, all, or a number from 1 on, for every k-th")


@dataclass(frozen=True)
class Instance:
    """What is kept of a file while the tree is read. `patient`, `study` and `series` are the archive's: never stored.

    Attributes:
        place: of a slice in its series: millimetres along the normal of its plane, or the number that it has.
    """

    file: Path
    patient: str
    study: str
    series: str
    modality: str
    view: str
    place: tuple[bool, float]
    frames: int
    spacing: Spacing | None


def read(root: Path, o: DicomOptions) -> Iterator[Study | Skipped]:
    """The studies of a tree in the order of their first files, all headers read before the first is told.

    Raises:
        UserError: `root` is no folder.
    """
    studies: dict[str, list[Instance]] = defaultdict(list)
    numbers: dict[str, int] = {}
    folders: dict[Path, set[str]] = defaultdict(set)
    seen: set[str] = set()
    for file in files_under(root):
        name = file.relative_to(root).as_posix()
        if file.name == "DICOMDIR" or not (is_dicom(file) or file.suffix.lower() in (".dcm", ".dicom")):
            continue
        try:
            instance, uid = _instance(file)
            if uid and uid in seen:
                raise _Unusable("it is the same image as an earlier file")
        except _Unusable as reason:
            yield Skipped(name, name, str(reason))
            continue
        except UserError as error:
            yield Skipped(name, name, str(error).replace(str(file), "the file"))
            continue
        seen.add(uid)
        studies[instance.study].append(instance)
        numbers.setdefault(instance.patient, len(numbers) + 1)
        for folder in file.parents:
            folders[folder].add(instance.study)
            if folder == root:
                break
    for number, instances in enumerate(studies.values(), 1):
        patient = f"patient-{numbers[instances[0].patient]:05d}"
        split = split_of(instances[0].patient, o.validation, o.test)
        try:
            text = _report_file(root, [one.file for one in instances], folders)
            report = read_text(text) if text else ""
        except UserError as error:
            yield Skipped(f"study-{number:05d}", instances[0].file.relative_to(root).as_posix(), str(error))
            continue
        for id_, images in _pictures(f"study-{number:05d}", instances, o):
            yield Study(id_, patient, tuple(images), report, split=split, source="dicom")


class _Unusable(Exception):
    """Why a file cannot become an image, in words of this module."""


def _instance(file: Path) -> tuple[Instance, str]:
    """What counts of a file, and its own id."""
    dataset = read_header(file, TAGS)
    try:
        with quiet():
            return _read_tags(file, dataset), str(dataset.get("SOPInstanceUID") or "")
    except DAMAGED as error:
        raise _Unusable("its header is damaged") from error


def _read_tags(file: Path, dataset: Dataset) -> Instance:
    code = str(dataset.get("Modality") or "")
    if code not in MODALITY:
        raise _Unusable(OTHERS.get(code, "its modality is none of CR, DX, CT, MR"))
    if not dataset.get("Rows") or not dataset.get("Columns"):
        raise _Unusable("it holds no pixels")
    if str(dataset.get("SOPClassUID") or "").startswith(SECONDARY):
        raise _Unusable("it is a secondary capture: a picture of a screen, as a rule with text")
    if dataset.get("BurnedInAnnotation") == "YES":
        raise _Unusable("its header says that text is burned into its pixels")
    if "LOCALIZER" in (dataset.get("ImageType") or ()):
        raise _Unusable("it is a localizer: it only shows where the slices of a series are")
    study = str(dataset.get("StudyInstanceUID") or "")
    if not study:
        raise _Unusable("its header does not say which study it belongs to")
    patient = f"{dataset.get('PatientID') or ''} {dataset.get('IssuerOfPatientID') or ''}".strip() or study
    axes = find(dataset, 0, "PlaneOrientationSequence", "ImageOrientationPatient")
    normal = None if axes is None or len(axes) != 6 else np.cross(*np.array(axes, dtype=float).reshape(2, 3))
    position = find(dataset, 0, "PlanePositionSequence", "ImagePositionPatient")
    if normal is not None and position is not None:
        place = (False, float(normal @ np.array(position, dtype=float)))
    else:
        place = (True, float(dataset.get("InstanceNumber") or 0))
    spacing = spacing_of(dataset)
    return Instance(
        file=file,
        patient=patient,
        study=study,
        series=str(dataset.get("SeriesInstanceUID") or ""),
        modality=MODALITY[code],
        view=_view(dataset, MODALITY[code], normal),
        place=place,
        frames=int(dataset.get("NumberOfFrames") or 1),
        spacing=None if spacing is None else squared_spacing(spacing),
    )


def _view(dataset: Dataset, modality: str, normal: np.ndarray | None) -> str:
    """A projection, or sequence and plane; words of this module only, empty when unknown."""
    if modality == "xray":
        return VIEWS.get(str(dataset.get("ViewPosition") or "").strip().upper(), "")
    sequence = ""
    if modality == "mri":
        said = " ".join(str(dataset.get(tag) or "") for tag in ("SeriesDescription", "ProtocolName", "SequenceName"))
        sequence = next((name for name, words in SEQUENCES if re.search(words, said.lower())), "")
        if sequence == "t1" and dataset.get("ContrastBolusAgent"):
            sequence = "t1ce"
    plane = "" if normal is None or not np.abs(normal).max() else PLANES[int(np.abs(normal).argmax())]
    return f"{sequence} {plane}".strip()


def _pictures(study: str, instances: list[Instance], o: DicomOptions) -> Iterator[tuple[str, list[Image]]]:
    """The studies that a study of the archive becomes: id and images of each."""
    series: dict[str, list[Instance]] = defaultdict(list)
    for instance in instances:
        series[instance.series].append(instance)
    together: list[Image] = []
    apart: list[tuple[str, list[Image]]] = []
    for number, members in enumerate(series.values(), 1):
        stack = [
            (one, frame)
            for one in sorted(members, key=lambda one: (one.modality, one.place))
            for frame in range(one.frames)
        ]
        if all(one.modality == "xray" for one in members):
            together += [_image(one, frame, o) for one, frame in stack]
        elif o.frames == "middle":
            together.append(_image(*stack[len(stack) // 2], o))
        else:
            step = 1 if o.frames == "all" else int(o.frames)
            chosen = list(enumerate(stack))[(step - 1) // 2 :: step]
            apart += [(f"{study}-{number:02d}-{k:03d}", [_image(one, frame, o)]) for k, (one, frame) in chosen]
    if together:
        yield study, together
    yield from apart


def _image(instance: Instance, frame: int, o: DicomOptions) -> Image:
    window = o.window if instance.modality == "ct" else None
    view = f"{window} {instance.view}".strip() if window in HU else instance.view
    return Image(instance.modality, Frame(instance.file, frame, window), view, instance.spacing)


def _report_file(root: Path, files: list[Path], folders: dict[Path, set[str]]) -> Path | None:
    """The text that belongs to a study, as `LAYOUT` says."""
    for file in files:
        for text in (file.with_suffix(".txt"), file.with_name(file.name + ".txt")):
            if text.is_file():
                return text
    folder = Path(os.path.commonpath([file.parent for file in files]))
    if folder == root or len(folders[folder]) > 1:
        return None
    texts: list[Any] = sorted(folder.glob("*.txt"))
    beside = folder.with_name(folder.name + ".txt")
    return texts[0] if len(texts) == 1 else beside if beside.is_file() else None


SOURCE = Source(read, DicomOptions, ABOUT, LAYOUT)
