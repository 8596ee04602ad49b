"""Files to 8-bit pictures: one way for training, sampling and evaluation."""

from __future__ import annotations

from pathlib import Path

import PIL.Image

from medim.errors import UserError
from medim.pictures.dicom import Frame, is_dicom
from medim.pictures.files import Backdrop, convert, open_file
from medim.pictures.picture import Picture, Pixels

__all__ = ["Backdrop", "Picture", "Pixels", "name_of", "read_picture"]


def read_picture(pixels: PIL.Image.Image | Path | Pixels, backdrop: Backdrop = "white") -> Picture:
    """Any of an image's forms as an 8-bit picture.

    A path is a DICOM file if its content says so, whatever its name (its first frame counts, windowed as the file
    asks), or anything that PIL opens. A slice of a volume is no path but a `medim.pictures.nifti.Slice`.

    Args:
        backdrop: what transparent pixels become: a slide's background is white, that of a radiograph black.

    Raises:
        UserError: see `Pixels.load`.
    """
    if isinstance(pixels, PIL.Image.Image):
        return convert(pixels, name_of(pixels), backdrop)
    if isinstance(pixels, Pixels):
        return pixels.load()
    if is_dicom(pixels):
        return Frame(pixels).load()
    if pixels.name.lower().endswith((".nii", ".nii.gz")):
        raise UserError(f"{pixels} is a volume: save the slice that is meant as PNG, or list slices by source nifti")
    return convert(open_file(pixels), str(pixels), backdrop)


def name_of(pixels: PIL.Image.Image | Path | Pixels) -> str:
    """What messages call it: its file, or ``"image"``."""
    if isinstance(pixels, PIL.Image.Image):
        return str(getattr(pixels, "filename", "") or "image")
    return str(pixels.file if isinstance(pixels, Pixels) else pixels)
