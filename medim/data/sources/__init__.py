"""Where studies come from: one reader a layout that archives are published in.

A reader lists what a folder holds, in an order that never changes, and opens no pixels. A source's options are a
dataclass beside its reader; on the command line they are ``key=value``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.data.sources import dicom, nifti
from medim.data.studies import Skipped, Study


@dataclass(frozen=True)
class Source:
    """A reader and what a user must know of it.

    Attributes:
        read: called with the root and its options; yields studies, and `Skipped` for what cannot be one.
        options: a class marked with `medim.config.options`, whose attributes its docstring explains.
        about: one line: what it reads.
        layout: the tree it expects, for `medim prepare SOURCE --help`.
    """

    read: Callable[[Path, Any], Iterator[Study | Skipped]]
    options: type
    about: str
    layout: str


SOURCES: dict[str, Source] = {
    "dicom": Source(dicom.read, dicom.DicomOptions, dicom.ABOUT, dicom.LAYOUT),
    "nifti": Source(nifti.read, nifti.NiftiOptions, nifti.ABOUT, nifti.LAYOUT),
}
