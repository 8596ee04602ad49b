"""Real lung outlines for the X-ray phantom, read at run time from an installed torchxrayvision (never shipped)."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import PIL.Image
from jaxtyping import Float
from scipy.ndimage import map_coordinates
from skimage.measure import label, regionprops

from medim.data.packaged import file_of
from medim.errors import UserError

ARCHIVE = "data/semantic_masks_v7labs_lungs.zip"
FINE = 4  # outlines are measured on a grid this much finer than the picture
WIDTH, CENTER = 0.72, (0.46, 0.5)  # both lungs together, as a share of the picture; (row, column) of their middle


def lung_pairs(side: int) -> list[dict[str, Float[np.ndarray, "H W"]]]:
    """Masks in [0, 1] of a right and a left lung, `side` pixels, scaled alike; what is not a pair is left out.

    Raises:
        UserError: torchxrayvision is not installed.
    """
    archive = file_of("torchxrayvision", ARCHIVE)
    if archive is None:
        raise UserError("real lung outlines come with torchxrayvision: pip install --no-deps torchxrayvision==1.5.7")
    pairs = []
    with zipfile.ZipFile(archive) as files:
        for name in sorted(files.namelist()):
            if not name.endswith("/"):
                with PIL.Image.open(io.BytesIO(files.read(name))) as image:
                    small = np.asarray(image.convert("L").resize((FINE * side, FINE * side)))
                    pair = _pair(small > 63, side, image.height / image.width)
                if pair is not None:
                    pairs.append(pair)
    return pairs


def _pair(mask: np.ndarray, side: int, aspect: float) -> dict[str, Float[np.ndarray, "H W"]] | None:
    """The two largest regions of a mask, the one on the left of the picture first: that is the patient's right."""
    regions = sorted(regionprops(label(mask)), key=lambda r: -r.area)[:2]
    if len(regions) < 2 or regions[1].area < 0.35 * regions[0].area:
        return None
    regions.sort(key=lambda r: r.centroid[1])
    if regions[1].bbox[1] < regions[0].centroid[1]:  # one above the other, not side by side
        return None
    left, right = regions[0].bbox[1], regions[1].bbox[3]
    top, bottom = min(r.bbox[0] for r in regions), max(r.bbox[2] for r in regions)
    zoom = WIDTH * FINE * side / (right - left)  # of columns; rows follow with the picture's own aspect
    zoom_rows = zoom * aspect
    if not 0.5 < zoom_rows * (bottom - top) / (FINE * side) < 0.85:
        return None
    middle = ((top + bottom) / 2, (left + right) / 2)
    rows, columns = (
        (np.arange(side) + 0.5 - c * side) * FINE / z + m
        for c, z, m in zip(CENTER, (zoom_rows, zoom), middle, strict=True)
    )
    lungs = {}
    for name, region in zip(("right", "left"), regions, strict=True):
        full = np.zeros(mask.shape, np.float32)
        full[region.slice] = region.image_filled
        lungs[name] = map_coordinates(full, np.meshgrid(rows, columns, indexing="ij"), order=1, mode="constant")
    return lungs
