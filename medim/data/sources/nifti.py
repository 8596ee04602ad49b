"""NIfTI volumes as slices: BraTS, IXI, paired CT and MRI, or any tree whose names tell subject and sequence.

The sequences of a subject at one slice are the images of one study. Volumes are not registered or resampled to each
other: those that lie on another grid than the rest are skipped and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from medim.config import options
from medim.data.sources.base import Source, check_shares, files_under, read_text, split_of
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.pictures.nifti import AXIS, Grid, Plane, Slice, read_grid, read_volume, spacing_in
from medim.pictures.picture import squared_spacing
from medim.pictures.windows import parse_window

ABOUT = "NIfTI volumes as slices: BraTS, IXI, paired CT and MRI, or names matched by a pattern"
LAYOUT = """any folders; the last word of a name says the sequence, the rest of it the subject
  ROOT/BraTS20_Training_001/BraTS20_Training_001_t1.nii.gz  ..._t1ce, _t2, _flair  or  -t1n, -t1c, -t2w, -t2f
  ROOT/IXI-T2/IXI002-Guys-0828-T2.nii.gz                    -T1, -PD
  ROOT/1BA001/ct.nii.gz  ROOT/1BA001/mr.nii.gz              a folder a subject
  SUBJECT.txt or report.txt beside the volumes              a report, if there is one"""
WORDS = {  # as archives write it: modality and sequence
    **{word: ("mri", "t1") for word in ("t1", "t1w", "t1n")},
    **{word: ("mri", "t1ce") for word in ("t1ce", "t1c", "t1gd")},
    **{word: ("mri", "t2") for word in ("t2", "t2w")},
    **{word: ("mri", "flair") for word in ("flair", "t2f")},
    **{word: ("mri", "pd") for word in ("pd", "pdw")},
    **{word: ("mri", "") for word in ("mr", "mri")},
    "ct": ("ct", ""),
}
ORDER = list(WORDS.values())
NO_IMAGES = ("seg", "mask", "label", "labels")  # beside the volumes of these archives
PATIENT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+|(sub-[^_]+)_.*")  # subjects that are one of several visits
SHOWN = 0.1  # of the way from black to white: what is brighter counts as content


@options
class NiftiOptions:
    """Options of source nifti.

    Attributes:
        plane: of the slices: axial, coronal or sagittal.
        every: take every k-th slice.
        content: least share of a slice's pixels that are more than a tenth of the way from the volume's least value
            (of CT: the lower end of the window) to the upper end of the window. The first volume of each subject is
            decoded for it while the tree is listed; with 0, none is and empty slices come too.
        window: of CT: lung, soft, brain, bone, or "centre width" in HU. MRI: percentiles of the volume.
        pattern: a regular expression for the path below the root, with the groups `subject` and `sequence` (a word
            such as t1, t1ce, t2, flair, pd, mr, ct), instead of the rule for names.
        validation: share of the patients that is held out for it, by the hash of their names.
        test: likewise the share of the test split.
    """

    plane: Plane = "axial"
    every: int = 1
    content: float = 0.1
    window: str = "soft"
    pattern: str = ""
    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        parse_window(self.window)
        check_shares(self.validation, self.test)
        if self.every < 1 or not 0 <= self.content < 1:
            raise UserError(f"every={self.every} content={self.content:g}: from 1 on, and from 0 to less than 1")
        try:
            groups = set(re.compile(self.pattern).groupindex)
        except re.error as error:
            raise UserError(f"pattern={self.pattern}: no regular expression ({error})") from None
        if self.pattern and not {"subject", "sequence"} <= groups:
            raise UserError(f"pattern={self.pattern}: name its groups (?P<subject>...) and (?P<sequence>...)")


def read(root: Path, o: NiftiOptions) -> Iterator[Study | Skipped]:
    """The slices of all subjects, subject by subject in the order of their names.

    Raises:
        UserError: `root` is no folder.
    """
    subjects: dict[str, dict[tuple[str, str], Path]] = {}
    for file in files_under(root):
        name = file.relative_to(root).as_posix()
        if not name.lower().endswith((".nii", ".nii.gz")):
            continue
        subject, word = parse_name(name, o.pattern)
        if not o.pattern and word in NO_IMAGES:
            continue
        if word not in WORDS or not subject:
            told = f"the name tells no sequence ({', '.join(WORDS)}) and subject: rename it, or give pattern="
            yield Skipped(name, name, told)
        elif WORDS[word] in (volumes := subjects.setdefault(subject, {})):
            yield Skipped(name, name, f"subject {subject} has such a volume already")
        else:
            volumes[WORDS[word]] = file
    for subject, volumes in sorted(subjects.items()):
        yield from _slices(root, subject, volumes, o)


def parse_name(name: str, pattern: str = "") -> tuple[str, str]:
    """Subject and word for the sequence, in small letters; empty ones where the name does not tell.

    Example:
        >>> parse_name("IXI-T2/IXI002-Guys-0828-T2.nii.gz"), parse_name("1BA001/ct.nii.gz")
        (('IXI002-Guys-0828', 't2'), ('1BA001', 'ct'))
    """
    if pattern:
        found = re.fullmatch(pattern, name)
        return (found["subject"] or "", (found["sequence"] or "").lower()) if found else ("", "")
    *folders, last = name.split("/")
    stem = re.sub(r"\.nii(\.gz)?$", "", last, flags=re.IGNORECASE)
    if stem.lower() in (*WORDS, *NO_IMAGES):
        return (folders[-1] if folders else ""), stem.lower()
    found = re.fullmatch(r"(.+)[-_]([^-_]+)", stem)
    return (found[1], found[2].lower()) if found else ("", "")


def _slices(
    root: Path, subject: str, volumes: dict[tuple[str, str], Path], o: NiftiOptions
) -> Iterator[Study | Skipped]:
    """The studies of one subject."""
    grids: dict[tuple[str, str], Grid] = {}
    for kind in sorted(volumes, key=ORDER.index):
        try:
            grids[kind] = read_grid(volumes[kind])
        except UserError as error:
            yield _skipped(root, volumes[kind], error)
    shared = max(([k for k in grids if grids[k].same(one)] for one in grids.values()), key=len, default=[])
    for kind in grids:
        if kind not in shared:
            file = volumes[kind].relative_to(root).as_posix()
            yield Skipped(file, file, f"it lies on another grid than others of {subject}: resample it")
    if not shared:
        return
    first = Slice(volumes[shared[0]], o.plane, 0, _window(shared[0], o))
    try:
        report = _report(subject, [volumes[kind] for kind in shared])
        shown = range(grids[shared[0]].shape[AXIS[o.plane]]) if not o.content else _with_content(first, o.content)
    except UserError as error:
        yield _skipped(root, volumes[shared[0]], error)
        return
    spacing = spacing_in(o.plane, grids[shared[0]])
    found = PATIENT.fullmatch(subject)
    patient = subject if found is None else found[1] or found[2]
    for index in shown[(o.every - 1) // 2 :: o.every]:
        images = [
            Image(
                kind[0],
                Slice(volumes[kind], o.plane, index, _window(kind, o)),
                f"{kind[1]} {o.plane}".strip(),
                None if spacing is None else squared_spacing(spacing),
            )
            for kind in shared
        ]
        split = split_of(patient, o.validation, o.test)
        yield Study(f"{subject}-{o.plane}-{index:03d}", patient, tuple(images), report, split=split, source="nifti")


def _window(kind: tuple[str, str], o: NiftiOptions) -> str | None:
    return o.window if kind[0] == "ct" else None


def _with_content(first: Slice, least: float) -> list[int]:
    """Slices of the volume in which enough is to be seen."""
    volume = read_volume(first.file)
    low, high = parse_window(first.window) if first.window else (volume.least, volume.window[1])
    others = tuple(axis for axis in range(3) if axis != AXIS[first.plane])
    share = (volume.values > low + SHOWN * (high - low)).mean(axis=others)
    return np.flatnonzero(share >= least).tolist()


def _report(subject: str, files: list[Path]) -> str:
    """The text beside the volumes; ``report.txt`` counts only where the folder is the subject's own."""
    for folder in dict.fromkeys(file.parent for file in files):
        names = [f"{subject}.txt", "report.txt"] if folder.name == subject else [f"{subject}.txt"]
        for name in names:
            if (folder / name).is_file():
                return read_text(folder / name)
    return ""


def _skipped(root: Path, file: Path, error: UserError) -> Skipped:
    name = file.relative_to(root).as_posix()
    return Skipped(name, name, str(error).replace(str(file), "the file"))


SOURCE = Source(read, NiftiOptions, ABOUT, LAYOUT)
