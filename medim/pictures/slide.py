"""Regions of whole-slide images at full resolution."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL.Image

from medim.errors import UserError
from medim.pictures.picture import Picture

KEPT = 8  # open slides; the tiles of one slide are neighbours in most lists


@dataclass(frozen=True)
class Region:
    """A square region of a slide at level 0.

    Attributes:
        x, y: column and row of its top left pixel.
        side: pixels.
    """

    file: Path
    x: int
    y: int
    side: int

    def load(self) -> Picture:
        """Read it; what the scanner left out is white.

        Raises:
            UserError: missing, damaged, no slide, or the region does not lie inside it.
            ImportError: OpenSlide is missing; the text holds the pip line.
        """
        openslide = _openslide()
        slide = _open(self.file)
        width, height = slide.dimensions
        if self.x < 0 or self.y < 0 or self.x + self.side > width or self.y + self.side > height:
            raise UserError(
                f"{self.file}: {self.side} pixels from column {self.x}, row {self.y} are not inside its "
                f"{width}x{height}"
            )
        try:
            rgba = slide.read_region((self.x, self.y), 0, (self.side, self.side))
        except openslide.OpenSlideError as error:
            _open.cache_clear()  # OpenSlide gives nothing more from a handle that has failed
            raise UserError(f"{self.file}: the slide is damaged ({error})") from error
        white = PIL.Image.new("RGBA", rgba.size, "white")
        microns = [
            slide.properties.get(name) for name in (openslide.PROPERTY_NAME_MPP_Y, openslide.PROPERTY_NAME_MPP_X)
        ]
        spacing = (float(microns[0]) / 1000, float(microns[1]) / 1000) if all(microns) else None
        return Picture(PIL.Image.alpha_composite(white, rgba).convert("RGB"), spacing=spacing)


@functools.lru_cache(maxsize=KEPT)
def _open(file: Path) -> Any:
    openslide = _openslide()
    if not file.is_file():
        raise UserError(f"slide {file} does not exist")
    try:
        return openslide.OpenSlide(file)
    except openslide.OpenSlideError as error:
        raise UserError(f"{file} cannot be read as a slide ({error}): OpenSlide reads svs, tiff, ndpi, mrxs") from error


def _openslide() -> Any:
    try:
        import openslide
    except ImportError as error:
        raise ImportError("slides need OpenSlide: pip install 'medim[data]'") from error
    return openslide
