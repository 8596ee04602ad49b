"""NIfTI volumes as slices: BraTS, IXI, paired CT and MRI, or any tree whose names tell subject and sequence.

The sequences of a subject at one slice are the images of one study. Volumes are not registered to each other. One that
lies on another grid than the rest is resampled to theirs if its header says that both are in one space, or if the user
does; else it is skipped and named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from medim.config import options
from medim.data.atlas import Atlas, Sections
from medim.data.sources.base import Source, check_shares, files_under, read_text, split_of
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.pictures.nifti import AXIS, PLANES, Grid, Plane, Slice, read_grid, read_volume, spacing_in
from medim.pictures.picture import squared_spacing
from medim.pictures.windows import HU, parse_window

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
    **{word: ("mri", word) for word in ("gm", "wm", "csf")},  # tissue maps
    **{word: ("mri", "") for word in ("mr", "mri")},
    "ct": ("ct", ""),
}
Kind = tuple[str, str]  # modality and sequence
ORDER = list(WORDS.values())
SCANNER, STANDARD = 1, (3, 4)  # sform codes
NO_IMAGES = ("seg", "mask", "label", "labels")  # beside the volumes of these archives
PATIENT = re.compile(r"(BraTS-[A-Za-z]+-\d+)-\d+|(sub-[^_]+)_.*")  # subjects that are one of several visits
SHOWN = 0.1  # of the way from black to white: what is brighter counts as content


@options
class NiftiOptions:
    """Options of source nifti.

    Attributes:
        plane: of the slices: axial, coronal, sagittal, or all three.
        every: take every k-th slice.
        content: least share of a slice's pixels that are more than a tenth of the way from the volume's least value
            (of CT: the lower end of the window) to the upper end of the window. The first volume of each subject is
            decoded for it while the tree is listed; with 0, none is and empty slices come too.
        window: of CT: lung, soft, brain, bone, or "centre width" in HU. MRI: percentiles of the volume.
        pattern: a regular expression for the path below the root, with the groups `subject` and `sequence` (a word
            such as t1, t1ce, t2, flair, pd, mr, ct), instead of the rule for names.
        atlas: a NIfTI file of labels in the volumes' space, with a table of names beside it: reports of the slices'
            plane, level and regions, where a subject has no text of its own.
        resample: volumes on another grid than most of a subject's: `registered` resamples (linearly, by nibabel) those
            whose headers say that both are in one standard space (sform code 3 or 4), `force` all, as their headers
            place them, `no` none. What is not resampled is skipped. An atlas is taken to be in the space of all volumes
            but those of a scanner (codes 0 and 1), which `force` alone takes.
        validation: share of the patients that is held out for it, by the hash of their names.
        test: likewise the share of the test split.
        held_out: subjects that are the test split, instead of a share; with `slabs`, all of their slices.
        slabs: hold out parts of every head instead of patients: a slab each so many slices, by turns of the splits test
            and validation (sagittal ones mirrored, since heads are); 0 holds out none.
        slab: slices of a slab.
        gap: slices beside a slab, on both sides, that are left out altogether: neighbours look alike.
    """

    plane: Plane | Literal["all"] = "axial"
    every: int = 1
    content: float = 0.1
    window: str = "soft"
    pattern: str = ""
    atlas: str = ""
    resample: Literal["registered", "force", "no"] = "registered"
    validation: float = 0.1
    test: float = 0.1
    held_out: tuple[str, ...] = ()
    slabs: Annotated[int, Field(ge=0)] = 0
    slab: Annotated[int, Field(ge=1)] = 6
    gap: Annotated[int, Field(ge=0)] = 4

    def __post_init__(self) -> None:
        parse_window(self.window)
        check_shares(self.validation, self.test)
        if self.every < 1 or not 0 <= self.content < 1:
            raise UserError(f"every={self.every} content={self.content:g}: from 1 on, and from 0 to less than 1")
        if self.slabs and self.slabs < self.slab + 2 * self.gap + 1:
            raise UserError(
                f"slabs={self.slabs}: a slab of {self.slab} with gaps of {self.gap} leaves none of so many to train on"
            )
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
    atlas = Atlas.read(o.atlas) if o.atlas else None
    subjects: dict[str, dict[Kind, Path]] = {}
    for file in files_under(root):
        name = file.relative_to(root).as_posix()
        if not name.lower().endswith((".nii", ".nii.gz")):
            continue
        subject, word = parse_name(name, o.pattern)
        if (not o.pattern and word in NO_IMAGES) or (o.atlas and file.samefile(o.atlas)):
            continue
        if word not in WORDS or not subject:
            told = f"the name tells no sequence ({', '.join(WORDS)}) and subject: rename it, or give pattern="
            yield Skipped(name, name, told)
        elif WORDS[word] in (volumes := subjects.setdefault(subject, {})):
            yield Skipped(name, name, f"subject {subject} has such a volume already")
        else:
            volumes[WORDS[word]] = file
    unknown = [subject for subject in o.held_out if subject not in subjects]
    if unknown:
        raise UserError(f"held_out={unknown[0]}: no such subject; there are {', '.join(sorted(subjects)[:10])}")
    for subject, volumes in sorted(subjects.items()):
        yield from _subject(root, subject, volumes, atlas, o)


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


def _subject(
    root: Path, subject: str, volumes: dict[Kind, Path], atlas: Atlas | None, o: NiftiOptions
) -> Iterator[Study | Skipped]:
    """The studies of one subject."""
    grids: dict[Kind, Grid] = {}
    for kind in sorted(volumes, key=ORDER.index):
        try:
            grids[kind] = read_grid(volumes[kind])
        except UserError as error:
            yield _skipped(root, volumes[kind], error)
    shared = max(([k for k in grids if grids[k].same(one)] for one in grids.values()), key=len, default=[])
    if not shared:
        return
    grid, first = grids[shared[0]], shared[0]
    like: dict[Kind, Path | None] = dict.fromkeys(shared)
    for kind in grids:
        if kind in shared:
            continue
        if o.resample == "force" or (o.resample == "registered" and grid.space == grids[kind].space in STANDARD):
            like[kind] = volumes[first]
            continue
        name = volumes[kind].relative_to(root).as_posix()
        reason = f"it lies on another grid than others of {subject}: no header says that they are registered"
        yield Skipped(name, name, f"{reason}; register it, or take it as it lies with --resample force")
    shown = {kind: (volumes[kind], like[kind]) for kind in sorted(like, key=ORDER.index)}
    try:
        report = _report(subject, [volumes[kind] for kind in shown])
        sections = None
        if atlas is not None and not report:
            if grid.space <= SCANNER and o.resample != "force":
                raise UserError(
                    f"{volumes[first]} is in its scanner's space by its header (sform code {grid.space}), the atlas is "
                    "not: register it to the atlas, or take it as it lies with --resample force"
                )
            sections = atlas.on(grid)
        for plane in PLANES if o.plane == "all" else (o.plane,):
            yield from _slices(subject, shown, first, plane, grid, report, sections, o)
    except UserError as error:
        yield _skipped(root, volumes[first], error)


def _slices(
    subject: str,
    shown: dict[Kind, tuple[Path, Path | None]],
    first: Kind,
    plane: Plane,
    grid: Grid,
    report: str,
    sections: Sections | None,
    o: NiftiOptions,
) -> Iterator[Study]:
    """The studies of a subject's slices of one plane."""
    whole = Slice(shown[first][0], plane, 0, _window(first, o))
    depth = grid.shape[AXIS[plane]]
    seen = range(depth) if not o.content else _with_content(whole, o.content)
    spacing = spacing_in(plane, grid)
    found = PATIENT.fullmatch(subject)
    patient = subject if found is None else found[1] or found[2]
    for index in seen[(o.every - 1) // 2 :: o.every]:
        split = _split(subject, patient, plane, index, depth, o)
        if not split:
            continue
        images = [
            Image(
                kind[0],
                Slice(file, plane, index, _window(kind, o), like),
                _view(kind, plane, o),
                None if spacing is None else squared_spacing(spacing),
            )
            for kind, (file, like) in shown.items()
        ]
        text = sections.report(plane, index) if sections is not None else report
        yield Study(f"{subject}-{plane}-{index:03d}", patient, tuple(images), text, split=split, source="nifti")


def _split(subject: str, patient: str, plane: Plane, index: int, depth: int, o: NiftiOptions) -> str:
    """The split of a slice; empty in the gap beside a slab."""
    if subject in o.held_out:
        return "test"
    if o.held_out or o.slabs:
        return slab_of(index, depth, o, mirrored=plane == "sagittal") if o.slabs else "train"
    return split_of(patient, o.validation, o.test)


def slab_of(index: int, depth: int, o: NiftiOptions, mirrored: bool = False) -> str:
    """The split of a slice when slabs are held out: one in the middle of each `slabs` slices, by turns test and
    validation, train elsewhere, and empty in the gaps.

    Example:
        >>> o = NiftiOptions(slabs=10, slab=2, gap=1)
        >>> [slab_of(i, 100, o)[:2] for i in range(10)]
        ['tr', 'tr', 'tr', '', 'te', 'te', '', 'tr', 'tr', 'tr']
        >>> slab_of(14, 100, o), slab_of(20, 100, o, mirrored=True), slab_of(79, 100, o, mirrored=True)
        ('validation', 'train', 'train')
    """
    if mirrored:
        index = min(index, depth - 1 - index)
    start = (o.slabs - o.slab) // 2
    place = index % o.slabs - start
    if 0 <= place < o.slab:
        return "validation" if index // o.slabs % 2 else "test"
    return "" if -o.gap <= place < o.slab + o.gap else "train"


def _view(kind: Kind, plane: Plane, o: NiftiOptions) -> str:
    """Sequence or window, and plane."""
    named = o.window if kind[0] == "ct" and o.window in HU else ""
    return " ".join(word for word in (kind[1], named, plane) if word)


def _window(kind: Kind, o: NiftiOptions) -> str | None:
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
