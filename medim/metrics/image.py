"""Likeness of pairs of pictures, 8 bits a channel, by scikit-image."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
from jaxtyping import UInt8
from numpy import ndarray
from skimage.metrics import peak_signal_noise_ratio, structural_similarity


def psnr(real: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; infinite for equal pictures.

    Raises:
        ValueError: the pictures differ in size.
    """
    a, b = _pair(real, other)
    return math.inf if np.array_equal(a, b) else float(peak_signal_noise_ratio(a, b))


def ssim(real: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """Structural similarity (Wang et al. 2004; 7x7 uniform window), at most 1; the mean over channels for colour.

    Raises:
        ValueError: the pictures differ in size, or a side is shorter than 7 pixels.
    """
    a, b = _pair(real, other)
    return float(structural_similarity(a, b, channel_axis=2 if a.ndim == 3 else None))


def mae(real: PIL.Image.Image, other: PIL.Image.Image) -> float:
    """Mean absolute error, of the whole range of 8 bits: 0 for equal pictures, at most 1.

    Raises:
        ValueError: the pictures differ in size.
    """
    a, b = _pair(real, other)
    return float(np.abs(a.astype(float) - b).mean() / 255)


def _pair(real: PIL.Image.Image, other: PIL.Image.Image) -> tuple[UInt8[ndarray, "H W *C"], UInt8[ndarray, "H W *C"]]:
    """Both as arrays, gray only if both are."""
    if real.size != other.size:
        raise ValueError(f"pictures of {real.size} and {other.size} pixels cannot be compared: resize one")
    mode = "L" if real.mode == other.mode == "L" else "RGB"
    return np.asarray(real.convert(mode)), np.asarray(other.convert(mode))
