"""Slices of NIfTI volumes as 8-bit pictures, shown as radiology shows them.

Volumes are turned to RAS (indices grow to the patient's right, front and head), to the nearest axis: an oblique volume
is not resampled, unless it is to lie on the grid of another. An axial slice is seen from the feet and a coronal one
from the front, so that the patient's right is on the left of the picture; a sagittal one has the face on the left; the
front or the head is at the top.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
from jaxtyping import Float, Num

from medim.errors import UserError
from medim.pictures.picture import Picture, Spacing, squared
from medim.pictures.windows import parse_window, to_8_bits

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = get_args(Plane)
AXIS: dict[Plane, int] = {"sagittal": 0, "coronal": 1, "axial": 2}  # of RAS, across the plane
PERCENTILES = (0.5, 99.5)
KEPT = 5  # decoded volumes that are kept: the sequences of one patient


@dataclass(frozen=True)
class Grid:
    """Where the voxels of a volume are, turned to RAS.

    Attributes:
        spacing: millimetres along each axis, or None if the header gives none.
        affine: from voxels to millimetres, [4, 4].
        space: what the header says of the millimetres (NIfTI's sform code): 0 nothing, 1 a scanner's, 2 another
            volume's, 3 Talairach's, 4 MNI's. nibabel writes 2 unless it is told.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float] | None
    affine: Float[np.ndarray, "4 4"]
    space: int = 0

    def same(self, other: Grid) -> bool:
        """Whether voxels of one index lie at one place, to a tenth of a millimetre."""
        return self.shape == other.shape and bool(np.abs(self.affine - other.affine).max() < 0.1)


@dataclass(frozen=True)
class Volume:
    """A decoded volume, turned to RAS."""

    file: Path
    values: Num[np.ndarray, "X Y Z"]
    grid: Grid

    def on(self, grid: Grid, labels: bool = False) -> Volume:
        """The same volume on the voxels of another grid, by nibabel: linear interpolation, or of `labels` the nearest.

        Millimetres are taken as they are: nothing is registered. Outside the volume it is 0.
        """
        import nibabel
        from nibabel.processing import resample_from_to

        here = nibabel.Nifti1Image(self.values.astype(np.int32 if labels else np.float32), self.grid.affine)
        there = resample_from_to(here, (grid.shape, grid.affine), order=0 if labels else 1)
        return Volume(self.file, np.asanyarray(there.dataobj), grid)

    @cached_property
    def least(self) -> float:
        """The least finite value.

        Raises:
            UserError: no voxel is finite.
        """
        finite = self.values[np.isfinite(self.values)]
        if not finite.size:
            raise UserError(f"{self.file} holds no finite voxel (NaN everywhere): leave it out")
        return float(finite.min())

    @cached_property
    def window(self) -> tuple[float, float, str]:
        """Percentiles 0.5 and 99.5 of the finite voxels other than zero, and how to say so; least and greatest value
        if the percentiles are one, as in a mask.

        Raises:
            UserError: no voxel is finite, or all have one value.
        """
        least, finite = self.least, self.values[np.isfinite(self.values)]
        if (inside := finite[finite != 0]).size:
            low, high = map(float, np.percentile(inside, PERCENTILES))
            if low < high:
                return low, high, f"percentile {PERCENTILES[0]:g} {PERCENTILES[1]:g} -> {low:g} {high:g}"
        most = float(finite.max())
        if least == most:
            raise UserError(f"{self.file} holds one value everywhere: leave it out")
        return least, most, f"range {least:g} {most:g}"


@dataclass(frozen=True)
class Slice:
    """One slice of a volume.

    Attributes:
        index: along the axis across the plane, from the patient's left, back or feet.
        window: ``"centre width"`` or a name of `medim.pictures.windows.HU` (for CT). None is percentiles 0.5 to 99.5
            of the volume's voxels other than zero, so that all slices of a volume share one window.
        like: a volume on whose grid it is resampled first.
    """

    file: Path
    plane: Plane
    index: int
    window: str | None = None
    like: Path | None = None

    def load(self) -> Picture:
        """Cut it out of its volume, which is decoded once for all of its slices; voxels that are not finite are black,
        pixels that are not square are resampled.

        Raises:
            UserError: no volume, damaged, no such slice, no finite voxel, or one value everywhere.
        """
        volume = read_volume(self.file, self.like)
        axis = AXIS[self.plane]
        if not 0 <= self.index < volume.values.shape[axis]:
            raise UserError(f"{self.file} has {volume.values.shape[axis]} {self.plane} slices: no slice {self.index}")
        if self.window is None:
            low, high, window = volume.window
        else:
            low, high = parse_window(self.window)
            window = f"hu {low:g} {high:g}"
        window += ", resampled" if self.like else ""
        plane = np.moveaxis(volume.values, axis, 0)[self.index, ::-1, ::-1].T
        spacing = spacing_in(self.plane, volume.grid)
        return squared(Picture(PIL.Image.fromarray(to_8_bits(plane, low, high)), window, spacing), self.file)


def spacing_in(plane: Plane, grid: Grid) -> Spacing | None:
    """Millimetres per pixel (rows, columns) of a plane's voxels."""
    if grid.spacing is None:
        return None
    columns, rows = (s for axis, s in enumerate(grid.spacing) if axis != AXIS[plane])
    return rows, columns


def read_grid(file: Path) -> Grid:
    """Where a volume's voxels are, from the header alone.

    Raises:
        UserError: missing, damaged, not one volume of numbers.
    """
    return _open(file)[1]


def read_volume(file: Path, like: Path | None = None) -> Volume:
    """A volume, on the grid of `like` if that is given, from the cache of the last few if the files are the same.

    Raises:
        UserError: missing, damaged, not one volume of numbers.
    """
    try:
        changed = file.stat().st_mtime_ns
        return _decode(file, changed) if like is None else _resampled(file, like, (changed, like.stat().st_mtime_ns))
    except FileNotFoundError:
        raise UserError(f"volume {file} does not exist") from None


@functools.lru_cache(maxsize=KEPT)
def _decode(file: Path, changed: int) -> Volume:
    from nibabel.orientations import apply_orientation

    image, grid, orientation = _open(file)
    try:
        values = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise UserError(f"{file}: the volume is damaged or incomplete") from error
    if values.dtype.itemsize > 4:
        values = values.astype(np.float32)
    return Volume(file, apply_orientation(values.reshape(image.shape[:3]), orientation), grid)


@functools.lru_cache(maxsize=KEPT)
def _resampled(file: Path, like: Path, changed: tuple[int, int]) -> Volume:
    return _decode(file, changed[0]).on(read_grid(like))


def _open(file: Path) -> tuple[Any, Grid, np.ndarray]:
    """nibabel's image, its grid in RAS, and how its axes go there."""
    try:
        import nibabel
        from nibabel.orientations import inv_ornt_aff, io_orientation
    except ImportError as error:
        raise ImportError("NIfTI volumes need nibabel: pip install 'medim[data]'") from error
    try:
        image: Any = nibabel.load(file)
        orientation = io_orientation(image.affine)
        kind = image.get_data_dtype()
    except FileNotFoundError:
        raise UserError(f"volume {file} does not exist") from None
    except (OSError, EOFError, ValueError, zlib.error, nibabel.filebasedimages.ImageFileError) as error:
        raise UserError(f"{file} cannot be read as NIfTI: it is damaged, or no NIfTI file") from error
    extra = [n for n in image.shape[3:] if n != 1]
    if len(image.shape) < 3 or extra or kind.kind not in "iuf" or 0 in image.shape:
        shape = "x".join(map(str, image.shape))
        raise UserError(f"{file} holds {shape} values of type {kind}: a single volume of numbers is wanted; split it")
    if np.isnan(orientation).any():
        raise UserError(f"{file}: the affine of its header maps no axis to the patient; correct it")
    affine = image.affine @ inv_ornt_aff(orientation, image.shape[:3])
    x, y, z = (int(image.shape[list(orientation[:, 0]).index(k)]) for k in range(3))
    mm = nibabel.affines.voxel_sizes(affine).tolist()
    known = all(0 < one < np.inf for one in mm)
    space = int(image.header["sform_code"]) if "sform_code" in image.header else 0
    return image, Grid((x, y, z), (mm[0], mm[1], mm[2]) if known else None, affine, space), orientation
