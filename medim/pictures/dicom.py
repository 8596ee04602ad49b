"""Frames of DICOM files as 8-bit pictures: rescale, window, inversion, colours, spacing.

What a message says of a file is its name and what is wrong with it, never a value of its header: that could be a
name. Burned-in text and overlays are not looked at.

Source: DICOM PS3.3 C.7.6.3 (image pixel), C.11.1 (modality LUT), C.11.2 (VOI LUT and window), C.7.6.16 (groups of a
multi-frame file).
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from jaxtyping import Bool, Num, UInt8

from medim.errors import UserError
from medim.pictures.picture import Picture, Spacing, squared
from medim.pictures.windows import HU, parse_window, to_8_bits

if TYPE_CHECKING:
    from pydicom import Dataset

# all that pydicom and its decoders raise for files that are no good
DAMAGED = (OSError, EOFError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, struct.error)
DECODERS = "pip install python-gdcm"


def is_dicom(path: Path) -> bool:
    """Whether a file is marked as DICOM (``DICM`` after 128 bytes), whatever its name."""
    try:
        with path.open("rb") as opened:
            return opened.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_header(file: Path, tags: list[str] | None = None) -> Dataset:
    """The header of a DICOM file without its pixels, only `tags` (keywords) if they are given.

    Raises:
        UserError: missing, damaged, or not DICOM.
        ImportError: pydicom is not installed; the text holds the pip line.
    """
    try:
        import pydicom
    except ImportError as error:
        raise ImportError("DICOM files need pydicom: pip install 'medim[data]'") from error
    wanted = None if tags is None else [*tags]
    try:
        with quiet():
            return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=wanted)
    except FileNotFoundError:
        raise UserError(f"image {file} does not exist") from None
    except (*DAMAGED, pydicom.errors.InvalidDicomError) as error:
        raise UserError(f"{file} cannot be read as DICOM: it is damaged, or no DICOM file") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without pydicom's warnings: they quote values of the header."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def find(dataset: Dataset, index: int, group: str, name: str) -> Any:
    """A value that a multi-frame file may keep by frame or for all frames (in `group`), others at the top; or None.

    A value that cannot be read counts as absent.
    """
    with contextlib.suppress(*DAMAGED), quiet():
        frames = list(dataset.get("PerFrameFunctionalGroupsSequence") or [])[index : index + 1]
        for holder in (*frames, *(dataset.get("SharedFunctionalGroupsSequence") or [])):
            for item in holder.get(group) or []:
                if item.get(name) is not None:
                    return item.get(name)
        return dataset.get(name)
    return None


def spacing_of(dataset: Dataset, index: int = 0) -> Spacing | None:
    """Millimetres per pixel (rows, columns): in the patient (PixelSpacing), or else at the detector."""
    for name in ("PixelSpacing", "ImagerPixelSpacing"):
        value = find(dataset, index, "PixelMeasuresSequence", name)
        with contextlib.suppress(TypeError, ValueError):
            rows, columns = map(float, value)
            if 0 < rows < np.inf and 0 < columns < np.inf:
                return rows, columns
    return None


@dataclass(frozen=True)
class Frame:
    """One frame of a DICOM file.

    Attributes:
        index: of the frame, from 0.
        window: ``"centre width"``, or for CT a name of `medim.pictures.windows.HU`. None is what the file asks for:
            its VOI LUT or its first window; else soft tissue for CT, and from the least to the greatest value for all
            others.
    """

    file: Path
    index: int = 0
    window: str | None = None

    def load(self) -> Picture:
        """Decode it; pixels that are not square are resampled.

        Raises:
            UserError: no DICOM, no pixels, no such frame, damaged, or a transfer syntax without an installed decoder.
        """
        dataset = read_header(self.file)
        try:
            with quiet():
                stored = self._decode(dataset)
                values, window = self._colours(dataset, stored) or self._gray(dataset, stored)
        except DAMAGED as error:
            raise UserError(f"{self.file}: the header does not say how its pixels are to be shown") from error
        return squared(Picture(PIL.Image.fromarray(values), window, spacing_of(dataset, self.index)), self.file)

    def _decode(self, dataset: Dataset) -> np.ndarray:
        """Stored values, [H, W] or [H, W, 3] (YBR as RGB)."""
        from pydicom.pixels import get_decoder, pixel_array

        if "Rows" not in dataset or "Columns" not in dataset:
            raise UserError(f"{self.file} holds no pixels: leave it out")
        frames = int(dataset.get("NumberOfFrames") or 1)
        if not 0 <= self.index < frames:
            raise UserError(f"{self.file} has {frames} frames: there is no frame {self.index}")
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            raise UserError(f"{self.file} does not say its transfer syntax: write it anew with its file meta header")
        name = syntax.name if syntax in _known_syntaxes() else "of its own"
        try:
            available = get_decoder(syntax).is_available
        except NotImplementedError:
            raise UserError(f"{self.file}: transfer syntax {name} is not a still picture's; convert it") from None
        if not available:
            raise UserError(f"{self.file}: transfer syntax {name} needs a decoder: {DECODERS}")
        try:
            return pixel_array(self.file, index=self.index)
        except DAMAGED as error:
            if "no 'Pixel Data'" in str(error) or "no pixel data" in str(error).lower():
                raise UserError(f"{self.file} holds no pixels: leave it out") from error
            other = f", or {name} of this kind needs another decoder: {DECODERS}" if syntax.is_encapsulated else ""
            raise UserError(f"{self.file}: its pixels are damaged or incomplete{other}") from error

    def _colours(self, dataset: Dataset, stored: np.ndarray) -> tuple[UInt8[np.ndarray, "H W 3"], str] | None:
        """8-bit RGB; None if the frame is gray."""
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            from pydicom.pixels import apply_color_lut

            stored = apply_color_lut(stored, dataset)[..., :3]
            bits = stored.dtype.itemsize * 8
        elif stored.ndim == 3:
            bits = int(dataset.BitsStored)
        else:
            return None
        window = f"range 0 {2**bits - 1}" if bits > 8 else ""
        return (stored >> max(bits - 8, 0)).astype(np.uint8), window

    def _gray(self, dataset: Dataset, stored: Num[np.ndarray, "H W"]) -> tuple[UInt8[np.ndarray, "H W"], str]:
        """8-bit grey, bright = dense as in any radiograph; padding is black."""
        padded = _padding(dataset, stored)
        shown, window = self._shown(dataset, self._modality_values(dataset, stored), padded)
        if dataset.PhotometricInterpretation == "MONOCHROME1":
            shown = 255 - shown
        return np.where(padded, np.uint8(0), shown), window

    def _modality_values(self, dataset: Dataset, stored: Num[np.ndarray, "H W"]) -> Num[np.ndarray, "H W"]:
        """Stored values in the modality's unit, such as HU."""
        if dataset.get("ModalityLUTSequence"):
            from pydicom.pixels import apply_modality_lut

            return apply_modality_lut(stored, dataset)
        group = "PixelValueTransformationSequence"
        slope, intercept = (find(dataset, self.index, group, f"Rescale{name}") for name in ("Slope", "Intercept"))
        return stored * float(1 if slope is None else slope) + float(intercept or 0)

    def _shown(
        self, dataset: Dataset, values: Num[np.ndarray, "H W"], padded: Bool[np.ndarray, "H W"]
    ) -> tuple[UInt8[np.ndarray, "H W"], str]:
        """Values through a window or VOI LUT, before inversion, and its name."""
        unit = "hu" if dataset.get("Modality") == "CT" else "window"
        if self.window is not None:
            if self.window in HU and unit != "hu":
                raise UserError(f'{self.file}: window {self.window} is one of CT; give "centre width" or none')
            low, high = parse_window(self.window)
            return to_8_bits(values, low, high), f"{unit} {low:g} {high:g}"
        if dataset.get("VOILUTSequence"):
            from pydicom.pixels import apply_voi

            bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
            return to_8_bits(apply_voi(np.round(values).astype(np.int64), dataset), 0.0, 2.0**bits - 1), "voi lut"
        asked = self._asked(dataset)
        if asked is not None:
            low, high, function = asked
            if function == "SIGMOID":
                curve = 1 / (1 + np.exp(np.clip(-4 * (values - (low + high) / 2) / (high - low), -99, 99)))
                return to_8_bits(curve, 0.0, 1.0), f"sigmoid {low:g} {high:g}"
            return to_8_bits(values, low, high), f"{unit} {low:g} {high:g}"
        if unit == "hu":
            low, high = parse_window("soft")
            return to_8_bits(values, low, high), f"hu {low:g} {high:g}"
        if padded.all() or (inside := values[~padded]).min() == inside.max():
            raise UserError(f"{self.file} holds one value everywhere: leave it out")
        low, high = float(inside.min()), float(inside.max())
        return to_8_bits(values, low, high), f"range {low:g} {high:g}"

    def _asked(self, dataset: Dataset) -> tuple[float, float, str] | None:
        """Ends and function of the file's first window; None without one, or with one that is none.

        LINEAR, the default, goes from centre - 0.5 - (width - 1) / 2 to centre - 0.5 + (width - 1) / 2; LINEAR_EXACT
        and SIGMOID are centred, width / 2 to both sides (C.11.2.1.2 and C.11.2.1.3).
        """
        found = [find(dataset, self.index, "FrameVOILUTSequence", f"Window{name}") for name in ("Center", "Width")]
        try:
            centre, width = (float(np.ravel(value)[0]) for value in found if value is not None)
        except (ValueError, TypeError, IndexError):
            return None
        function = find(dataset, self.index, "FrameVOILUTSequence", "VOILUTFunction") or "LINEAR"
        if function == "LINEAR":
            centre, width = centre - 0.5, width - 1
        return (centre - width / 2, centre + width / 2, str(function)) if 0 < width < np.inf else None


def _padding(dataset: Dataset, stored: Num[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels that the file calls padding: outside the field of view or the detector."""
    value, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if value is None:
        return np.zeros(stored.shape, dtype=bool)
    low, high = sorted((int(value), int(value if limit is None else limit)))
    return (stored >= low) & (stored <= high)


def _known_syntaxes() -> list[Any]:
    from pydicom.uid import AllTransferSyntaxes

    return AllTransferSyntaxes
