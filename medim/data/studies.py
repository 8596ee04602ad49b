"""The record every reader yields and every tokenizer takes: one study with its images and its report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import PIL.Image

from medim.pictures import Pixels


@dataclass(frozen=True)
class Image:
    """One image of a study.

    Attributes:
        modality: a name of `medim.vocabulary.MODALITIES` such as ``"xray"`` or ``"pathology"``.
        pixels: a PIL image, the path of an image file, or `medim.pictures.Pixels` that are read when they are needed.
        view: projection, sequence or plane as the source names it (``"AP"``, ``"t2"``), empty when unknown.
        spacing: millimetres per pixel (rows, columns), or None when the source does not say.
    """

    modality: str
    pixels: PIL.Image.Image | Path | Pixels
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


@dataclass(frozen=True)
class Skipped:
    """What a reader could not make a study of: `id` or file, relative to the root, and why, in one line."""

    id: str
    file: str
    reason: str
