"""Files to 8-bit pictures: one way for training, sampling and evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import PIL.Image


@dataclass(frozen=True)
class Picture:
    """An 8-bit picture, mode "L" or "RGB", and how it came about.

    Attributes:
        window: how values became 8 bits, such as ``"hu -160 240"`` or ``"percentile 0.5 99.5 -> 12 3071"``; empty if
            they were 8 bits.
        spacing: millimetres per pixel (rows, columns), or None.
    """

    image: PIL.Image.Image
    window: str = ""
    spacing: tuple[float, float] | None = None


@runtime_checkable
class Pixels(Protocol):
    """Pixels that are read when they are needed: a frame of a DICOM file, a slice of a volume, a region of a slide.

    Implementations are small frozen dataclasses: cheap to list by the million, and they can be pickled.
    """

    @property
    def file(self) -> Path:
        """The file that they are in; its hash goes into the dataset."""
        ...

    def load(self) -> Picture:
        """Read them.

        Raises:
            UserError: the file is missing, damaged, or holds no such pixels.
        """
        ...


def read_picture(pixels: PIL.Image.Image | Path | Pixels) -> Picture:
    """Any of an image's forms as an 8-bit picture.

    Raises:
        UserError: see `Pixels.load`.
    """
    if isinstance(pixels, Pixels):
        return pixels.load()
    raise NotImplementedError("helper B writes this")
