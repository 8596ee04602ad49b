"""Files that PIL reads (PNG, JPEG, TIFF, BMP ...) as 8-bit pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import PIL.Image
import PIL.ImageOps

from medim.errors import UserError
from medim.pictures.picture import Picture
from medim.pictures.windows import to_8_bits

Backdrop = Literal["white", "black"]


def open_file(path: Path) -> PIL.Image.Image:
    """A file's first frame, as it is stored.

    Raises:
        UserError: missing, damaged, or none of PIL's formats.
    """
    try:
        with PIL.Image.open(path) as opened:
            opened.load()
            return opened
    except FileNotFoundError:
        raise UserError(f"image {path} does not exist") from None
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as an image ({said}): give a PNG, JPEG, TIFF or DICOM file") from error


def convert(image: PIL.Image.Image, name: str, backdrop: Backdrop) -> Picture:
    """Any mode of PIL as "L" or "RGB", its EXIF orientation applied, transparent pixels as the backdrop.

    16-bit, 32-bit and floating-point greys are stretched from their own least and greatest value to 0..255, because
    their full range says nothing (12-bit scans are stored in 16 bits).

    Raises:
        UserError: such greys of one value, or not finite; a mode without a way to RGB.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high) or low == high:
            raise UserError(f"{name} (mode {image.mode}) holds one value everywhere or values that are not finite")
        return Picture(PIL.Image.fromarray(to_8_bits(values, low, high)), f"range {low:g} {high:g}")
    try:
        if image.has_transparency_data:
            rgba = image.convert("RGBA")
            image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", rgba.size, backdrop), rgba)
        return Picture(image.convert("L" if image.mode in ("1", "L") else "RGB"))
    except ValueError as error:
        raise UserError(f"{name} (mode {image.mode}) cannot be converted to RGB: save it as RGB") from error
