"""Values to 8 bits: windows by their ends, by name, and the stretch of what has no window."""

from __future__ import annotations

import numpy as np
from jaxtyping import Num, UInt8

from medim.errors import UserError

# centre and width in Hounsfield units, as radiology teaches them
HU: dict[str, tuple[float, float]] = {"lung": (-600, 1500), "soft": (40, 400), "brain": (40, 80), "bone": (400, 1800)}


def parse_window(text: str) -> tuple[float, float]:
    """The ends of a window: a name of `HU`, or ``"centre width"``.

    Example:
        >>> parse_window("soft"), parse_window("50 350")
        ((-160.0, 240.0), (-125.0, 225.0))

    Raises:
        UserError: no such name, no two numbers, or a width that is not positive.
    """
    try:
        centre, width = HU[text] if text in HU else map(float, text.split())
    except ValueError:
        raise UserError(f'window {text!r}: one of {", ".join(HU)}, or "centre width" such as "40 400"') from None
    if not (np.isfinite(centre) and 0 < width < np.inf):
        raise UserError(f"window {text!r}: the width must be positive")
    return float(centre - width / 2), float(centre + width / 2)


def to_8_bits(values: Num[np.ndarray, "H W"], low: float, high: float) -> UInt8[np.ndarray, "H W"]:
    """round(255 (v - low) / (high - low)), clipped to 0..255; what is not finite becomes 0."""
    scaled = (np.asarray(values, dtype=np.float64) - low) * (255.0 / (high - low))
    return np.round(np.clip(np.nan_to_num(scaled, nan=0.0, posinf=0.0, neginf=0.0), 0, 255)).astype(np.uint8)
