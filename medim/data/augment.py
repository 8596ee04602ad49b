"""The same picture taken otherwise: turned, moved and scaled a little, in another contrast. In pixels, before the VQ.

All images of a study share the geometry, so that they stay registered. Only gray levels that mean nothing by
themselves are changed: a CT's window and a tissue map's probability stay what they are. Nothing is mirrored, since
reports tell sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import PIL.Image

from medim.vocabulary import MODALITIES

ANGLE, SCALE, SHIFT = 10.0, 0.12, 0.05  # degrees, share, share of a side: at most, either way
GAMMA, GAIN = 0.25, 0.1  # log of the exponent, share: at most, either way
MAPS = ("gm", "wm", "csf")


@dataclass(frozen=True)
class Augmentation:
    """One way to take a picture.

    Attributes:
        angle: degrees, counter-clockwise. `scale`: above 1 enlarges.
        shift: (right, down), in shares of the sides.
        gamma, gain: v -> gain v^gamma of gray levels in [0, 1].
    """

    angle: float = 0.0
    scale: float = 1.0
    shift: tuple[float, float] = (0.0, 0.0)
    gamma: float = 1.0
    gain: float = 1.0

    @classmethod
    def draw(cls, rng: np.random.Generator) -> Augmentation:
        """A random one: uniform within the module's bounds."""
        angle, scale, right, down, gamma, gain = rng.uniform(-1, 1, 6)
        return cls(
            ANGLE * angle, 1 + SCALE * scale, (SHIFT * right, SHIFT * down), math.exp(GAMMA * gamma), 1 + GAIN * gain
        )

    def __call__(self, picture: PIL.Image.Image, modality: str, view: str) -> PIL.Image.Image:
        """The picture taken so; the same size. What comes in at the edges is black, white for a coloured one."""
        gray = MODALITIES[modality].gray
        picture = picture.convert("L" if gray else "RGB")
        width, height = picture.size
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        x, y = width / 2 * (1 + 2 * self.shift[0]), height / 2 * (1 + 2 * self.shift[1])  # where the centre goes
        a, b, d, e = cos / self.scale, -sin / self.scale, sin / self.scale, cos / self.scale
        data = (a, b, width / 2 - a * x - b * y, d, e, height / 2 - d * x - e * y)
        fill = 0 if gray else (255, 255, 255)
        moved = picture.transform(
            picture.size, PIL.Image.Transform.AFFINE, data, PIL.Image.Resampling.BICUBIC, fillcolor=fill
        )
        contrast = gray and modality != "ct" and not set(view.lower().split()) & set(MAPS)
        if not contrast or (self.gamma, self.gain) == (1.0, 1.0):
            return moved
        return moved.point([min(255, round(255 * self.gain * (v / 255) ** self.gamma)) for v in range(256)])
