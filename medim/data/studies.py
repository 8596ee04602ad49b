"""The record every reader yields and every tokenizer takes: one study with its images and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import PIL.Image


@dataclass(frozen=True)
class Image:
    """One image of a study.

    Attributes:
        modality: a name of `medim.vocabulary.MODALITIES` such as ``"xray"`` or ``"pathology"``.
        pixels: a PIL image, or the path of a file that PIL opens.
        view: projection, sequence or plane as the source names it (``"AP"``, ``"t2"``), empty when unknown.
        spacing: millimetres per pixel (rows, columns), or None when the source does not say.
    """

    modality: str
    pixels: PIL.Image.Image | Path
    view: str = ""
    spacing: tuple[float, float] | None = None


@dataclass(frozen=True)
class Study:
    """Images and report of one examination; `split` is train, validation or test, `source` says who made it."""

    id: str
    patient_id: str
    images: tuple[Image, ...]
    report: str
    prompt: str = ""
    split: str = "train"
    source: str = ""
