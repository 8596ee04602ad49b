"""What every reader of pixels gives, and what it must be able to do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, runtime_checkable

import PIL.Image

from medim.errors import UserError

Spacing = tuple[float, float]


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
    spacing: Spacing | None = None


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


def squared(picture: Picture, file: Path) -> Picture:
    """The picture with square pixels: resampled to the finer spacing where rows and columns differ (bicubic).

    Raises:
        UserError: one spacing is more than 50 times the other: no scanner does that.
    """
    if picture.spacing is None or (square := squared_spacing(picture.spacing)) == picture.spacing:
        return picture
    (rows, columns), fine = picture.spacing, square[0]
    if max(rows, columns) > 50 * fine:
        raise UserError(f"{file}: pixels of {rows:g} x {columns:g} mm cannot be right; correct the spacing in the file")
    size = round(picture.image.width * columns / fine), round(picture.image.height * rows / fine)
    return replace(picture, image=picture.image.resize(size, PIL.Image.Resampling.BICUBIC), spacing=square)


def squared_spacing(spacing: Spacing) -> Spacing:
    """The spacing after `squared`: the finer one, twice. A difference of up to 1 % is left alone: no eye sees it."""
    fine = min(spacing)
    return spacing if max(spacing) <= 1.01 * fine else (fine, fine)
