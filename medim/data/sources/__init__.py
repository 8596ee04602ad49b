"""Where studies come from: one reader a layout that archives are published in.

A reader lists what a folder holds, in an order that never changes, and opens no pixels. A source's options are a
dataclass beside its reader; on the command line they are ``--name value``.
"""

from __future__ import annotations

from medim.data.sources import demo, dicom, folder, manifest, mimic_cxr, nifti, open_i, pathgen
from medim.data.sources.base import Source

__all__ = ["SOURCES", "Source"]

SOURCES: dict[str, Source] = {
    "demo": demo.SOURCE,
    "folder": folder.SOURCE,
    "manifest": manifest.SOURCE,
    "mimic-cxr": mimic_cxr.SOURCE,
    "open-i": open_i.SOURCE,
    "pathgen": pathgen.SOURCE,
    "dicom": dicom.SOURCE,
    "nifti": nifti.SOURCE,
}
