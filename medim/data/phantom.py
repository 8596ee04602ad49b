"""A synthetic chest X-ray whose report is true of it: findings are drawn first, then told.

Everything is a pure function of (seed, index, split), so this is an endless dataset with fixed splits, and `parse`
reads every report back into findings, so that the coherence of an image with a text is measured instead of guessed.
As in any frontal film, the left of the image is the patient's right. Nothing here is, or is derived from, a patient.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import PIL.Image
from jaxtyping import Float
from scipy import ndimage

from medim.data.studies import Image, Study

SIZE = 96  # pixels a side, unless another is asked for
SIDES = ("right", "left")
ZONES = ("upper", "mid", "lower")
FINDINGS: tuple[str, ...] = (
    "cardiomegaly",
    *(f"{side} effusion" for side in SIDES),
    *(f"{side} pneumothorax" for side in SIDES),
    *(f"{side} {zone} opacity" for side in SIDES for zone in ZONES),
)
SPLITS = {"test": range(10_000), "validation": range(10_000, 20_000), "train": range(20_000, 2**40)}
HEART = {"normal": (0.38, 0.47), "mild": (0.52, 0.57), "marked": (0.60, 0.67)}  # cardiothoracic ratio
EFFUSION = {"small": (0.13, 0.22), "moderate": (0.28, 0.40), "large": (0.46, 0.60)}  # share of the lung's height
PNEUMOTHORAX = {"small": (0.14, 0.20), "large": (0.34, 0.50)}  # share of the lung's width that is air
MAX_SENTENCES = 6

Plane = Float[np.ndarray, "H W"]
Outlines = Literal["ellipse", "real"]


@dataclass(frozen=True)
class Anatomy:
    """What is drawn and told. Keys are sides, and (side, zone) for opacities; an absent key is an absent finding."""

    heart: str
    effusion: dict[str, str]
    pneumothorax: dict[str, str]
    opacity: tuple[tuple[str, str], ...]

    def findings(self) -> dict[str, bool]:
        """The eleven findings of `FINDINGS`, by name."""
        present = {f"{side} effusion" for side in self.effusion}
        present |= {f"{side} pneumothorax" for side in self.pneumothorax}
        present |= {f"{side} {zone} opacity" for side, zone in self.opacity}
        present |= set() if self.heart == "normal" else {"cardiomegaly"}
        return {name: name in present for name in FINDINGS}


def study(seed: int, index: int, split: str = "train", lungs: Outlines = "ellipse", pixels: int = SIZE) -> Study:
    """The `index`-th study of a split: one gray image of `pixels` a side and its report.

    Raises:
        IndexError: `index` lies outside the split's fixed range.
    """
    if index < 0:
        raise IndexError(f"index {index}: the studies of a split are counted from 0")
    number = SPLITS[split][index]
    drawing, noise, wording = (np.random.default_rng([seed, number, stream]) for stream in range(3))
    anatomy = draw_anatomy(drawing)
    image = PIL.Image.fromarray(render(anatomy, noise, lungs, pixels))
    name = f"xray-{split}-{index:06d}"
    return Study(
        id=name,
        patient_id=name,
        images=(Image("xray", image, view="PA"),),
        report=report(anatomy, wording),
        split=split,
        source="phantom",
    )


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Findings of one study, at rates high enough for each to be learnt (0.12 to 0.35)."""
    heart = str(rng.choice(list(HEART), p=[0.64, 0.18, 0.18]))
    effusion = {side: str(rng.choice(list(EFFUSION))) for side in SIDES if rng.random() < 0.18}
    pneumothorax = {
        side: str(rng.choice(list(PNEUMOTHORAX)))
        for side in SIDES
        if rng.random() < 0.16 and effusion.get(side, "small") == "small"
    }
    opacity = []
    for side in SIDES:
        hidden = {"small": 1, "moderate": 2, "large": 3}[effusion[side]] if side in effusion else 0
        for zone in ZONES[: len(ZONES) - hidden]:
            if rng.random() < 0.17 and not (side in pneumothorax and pneumothorax[side] == "large"):
                opacity.append((side, zone))
    told = len(effusion) + len(pneumothorax)
    keep = rng.permutation(len(opacity))[: max(0, MAX_SENTENCES - 1 - max(told, 1))]
    return Anatomy(heart, effusion, pneumothorax, tuple(opacity[i] for i in sorted(keep)))


# ---------------------------------------------------------------------------------------------------- the picture


def _soft(distance: Plane, width: float = 0.012) -> Plane:
    return 1 / (1 + np.exp(-np.clip(distance / width, -30, 30)))


@functools.cache
def _grid(pixels: int) -> tuple[Plane, Plane]:
    y, x = ((np.mgrid[0:pixels, 0:pixels] + 0.5) / pixels).astype(np.float32)
    return y, x


def _cloud(rng: np.random.Generator, width: float, pixels: int) -> Plane:
    """Smooth noise; `width` in pixels of a picture of `SIZE`. Larger pictures have the same cloud, drawn finer."""
    cloud = ndimage.gaussian_filter(rng.normal(0, 1, (SIZE, SIZE)), width)
    return cloud if pixels == SIZE else ndimage.zoom(cloud, pixels / SIZE, order=1, grid_mode=True, mode="nearest")


def _elliptic_lungs(rng: np.random.Generator, pixels: int) -> dict[str, Plane]:
    """Two lungs: an ellipse that narrows to the apex, cut below by the dome of the diaphragm."""
    y, x = _grid(pixels)
    middle, shift = 0.5 + rng.normal(0, 0.008), rng.normal(0, 0.012)
    lungs = {}
    for side, sign in (("right", -1), ("left", 1)):
        center = middle + sign * rng.uniform(0.195, 0.215)
        half_width, top = rng.uniform(0.145, 0.165), 0.13 + shift + rng.uniform(-0.015, 0.015)
        base = 0.82 + shift + rng.uniform(-0.02, 0.02) - (0.015 if side == "right" else 0.0)
        half_height = 0.40
        narrowing = half_width * (0.66 + 0.34 * np.clip((y - top) / 0.42, 0, 1))
        lean = center + sign * 0.05 * (y - 0.5)
        ellipse = 1 - ((x - lean) / narrowing) ** 2 - np.clip((top + half_height - y) / half_height, 0, None) ** 2.4
        dome = base - rng.uniform(0.05, 0.08) * (1 - ((x - lean + sign * 0.03) / half_width) ** 2)
        lungs[side] = _soft(ellipse, 0.06) * _soft(dome - y)
    return lungs


@functools.cache
def _real_outlines(pixels: int) -> list[dict[str, Plane]]:
    from medim.data.outlines import lung_pairs

    return lung_pairs(pixels)


def _lungs(rng: np.random.Generator, kind: Outlines, pixels: int) -> dict[str, Plane]:
    if kind == "ellipse":
        return _elliptic_lungs(rng, pixels)
    pairs = _real_outlines(pixels)
    return pairs[int(rng.integers(len(pairs)))]


@dataclass(frozen=True)
class _Box:
    top: float
    bottom: float
    left: float
    right: float

    @classmethod
    def of(cls, mask: Plane) -> _Box:
        rows, columns = np.flatnonzero(mask.max(1) > 0.5), np.flatnonzero(mask.max(0) > 0.5)
        return cls(*(float(v) / len(mask) for v in (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)))

    @property
    def height(self) -> float:
        return self.bottom - self.top

    @property
    def width(self) -> float:
        return self.right - self.left


def _vessels(rng: np.random.Generator, box: _Box, sign: int, pixels: int) -> Plane:
    """Bright branches that leave the hilum and fade, as a soft distance to a few segments."""
    y, x = _grid(pixels)
    hilum_x, hilum_y = (box.right if sign < 0 else box.left) + sign * 0.015, box.top + 0.47 * box.height
    angles = rng.uniform(-1.25, 1.25, size=(7, 1, 1)).astype(np.float32)
    dx, dy = sign * np.cos(angles), np.sin(angles)
    along = (x - hilum_x) * dx + (y - hilum_y) * dy
    across = np.abs((y - hilum_y) * dx - (x - hilum_x) * dy)
    lengths = rng.uniform(0.12, 0.26, size=(7, 1, 1)).astype(np.float32)
    lines = np.clip(1 - across / 0.013, 0, None) * np.clip(1 - along / lengths, 0, None) * (along > 0)
    return lines.max(0) + 0.9 * np.exp(-(((x - hilum_x) / 0.03) ** 2) - ((y - hilum_y) / 0.055) ** 2)


def _ribs(rng: np.random.Generator, pixels: int) -> Plane:
    y, x = _grid(pixels)
    start, gap = rng.uniform(0.10, 0.14), rng.uniform(0.082, 0.092)
    distance = np.abs(x - 0.5)
    phase = (y - start - 0.9 * np.clip(distance - 0.08, 0, None) ** 1.5 - 0.12 * np.clip(0.1 - distance, 0, None)) / gap
    return np.exp(-(((phase - np.round(phase)) / 0.16) ** 2)) * (distance > 0.05) * (distance < 0.42)


def _collapsed(lung: Plane, box: _Box, sign: int, air: float) -> Plane:
    """The lung shrunk towards its hilum by the share `air` of its width (0.4 of that in height)."""
    scale = np.array([1 - 0.4 * air, 1 - air])
    fixed = np.array([box.top + 0.62 * box.height, box.right if sign < 0 else box.left]) * len(lung) - 0.5
    return ndimage.affine_transform(lung, 1 / scale, fixed - fixed / scale, order=1)


def render(anatomy: Anatomy, rng: np.random.Generator, lungs: Outlines = "ellipse", pixels: int = SIZE) -> np.ndarray:
    """Draw the findings: uint8 [pixels, pixels], bright = dense."""
    y, x = _grid(pixels)
    fine = pixels / SIZE  # a blur is as wide a part of every picture; the grain of the film is that of its pixels
    masks = _lungs(rng, lungs, pixels)
    boxes = {side: _Box.of(mask) for side, mask in masks.items()}
    inside = masks["right"] + masks["left"]
    middle = (boxes["right"].right + boxes["left"].left) / 2
    outer = boxes["left"].right - boxes["right"].left

    body = _soft(0.47 + 0.06 * np.clip((y - 0.15) / 0.3, 0, 1) - np.abs(x - middle), 0.02) * _soft(y - 0.02, 0.03)
    image = 12 + body * (140 + 12 * np.clip((y - 0.75) / 0.2, 0, 1))
    air = 46.0 + rng.normal(0, 4)
    texture = _cloud(rng, 1.4, pixels) * 14
    image += inside * (air - 144 + texture)
    for side, sign in (("right", -1), ("left", 1)):
        image += inside * 44 * _vessels(rng, boxes[side], sign, pixels) * masks[side]
    image += 13 * _ribs(rng, pixels) * (0.35 + 0.65 * inside) * body

    for side, size in anatomy.pneumothorax.items():
        sign = -1 if side == "right" else 1
        shrunk = _collapsed(masks[side], boxes[side], sign, rng.uniform(*PNEUMOTHORAX[size]))
        free = np.clip(masks[side] - shrunk, 0, 1)
        edge = (
            np.abs(fine * ndimage.gaussian_gradient_magnitude(shrunk, 0.7 * fine))
            * masks[side]
            * _soft(0.95 - shrunk, 0.05)
        )
        image = image * (1 - free) + free * (20 + 5 * _ribs(rng, pixels)) + 110 * edge

    image = _mediastinum(image, anatomy, rng, middle, outer, boxes)
    for side, zone in anatomy.opacity:
        image += masks[side] * _opacity(rng, boxes[side], ZONES.index(zone), pixels)
    for side, size in anatomy.effusion.items():
        box, sign = boxes[side], (-1 if side == "right" else 1)
        level = box.bottom - rng.uniform(*EFFUSION[size]) * box.height
        lateral = np.clip(sign * (x - (box.left + box.right) / 2) / box.width + 0.5, 0, 1)
        fluid = masks[side] * _soft(y - level + 0.07 * lateral**2 - 0.02)
        image = image * (1 - fluid) + fluid * (184 + 0.15 * texture)

    image = ndimage.gaussian_filter(image, 0.6 * fine) * rng.uniform(0.95, 1.05) + rng.normal(0, 4)
    return np.clip(image + rng.normal(0, 2.0, image.shape), 0, 255).astype(np.uint8)


def _opacity(rng: np.random.Generator, box: _Box, zone: int, pixels: int) -> Plane:
    y, x = _grid(pixels)
    cy = box.top + (0.22, 0.50, 0.78)[zone] * box.height + rng.uniform(-0.02, 0.02)
    cx = box.left + rng.uniform(0.40, 0.60) * box.width
    ry, rx = rng.uniform(0.055, 0.075), rng.uniform(0.06, 0.085)
    blotch = 1 + 0.25 * _cloud(rng, 2.5, pixels) * 6
    return rng.uniform(80, 100) * np.exp(-((((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2) ** 1.5)) * blotch


def _mediastinum(
    image: Plane, anatomy: Anatomy, rng: np.random.Generator, middle: float, outer: float, boxes: dict[str, _Box]
) -> Plane:
    """Spine, great vessels and a heart whose width is the drawn cardiothoracic ratio times the thoracic width."""
    y, x = _grid(len(image))
    ratio = rng.uniform(*HEART[anatomy.heart])
    half = ratio * outer / 2
    floor = (boxes["right"].bottom + boxes["left"].bottom) / 2
    cx, cy = middle + 0.32 * half, floor - 0.175 + rng.uniform(-0.01, 0.01)
    tilt = (x - cx) + 0.18 * (y - cy)
    heart = _soft(1 - (tilt / half) ** 2 - ((y - cy) / (0.13 + 0.28 * half)) ** 2, 0.08)
    column = _soft(0.055 + 0.02 * rng.random() - np.abs(x - middle)) * _soft(floor + 0.12 - y, 0.05)
    knob = np.exp(-(((x - middle - 0.06) / 0.04) ** 2) - ((y - 0.33) / 0.05) ** 2)
    dense = np.clip(np.maximum(heart, 0.9 * column) + 0.7 * knob * (1 - heart), 0, 1)
    spine = 10 * np.exp(-(((x - middle) / 0.03) ** 2)) * (1 + 0.5 * np.cos(2 * np.pi * y / 0.07))
    return image * (1 - dense) + dense * (172 + spine)


# ------------------------------------------------------------------------------------------------------- the words

_HEART_WORDS = {
    "normal": ("The heart is normal in size.", "Heart size is normal.", "Normal heart size."),
    "mild": ("The heart is mildly enlarged.", "Mild cardiomegaly.", "Mildly enlarged heart."),
    "marked": ("The heart is markedly enlarged.", "Marked cardiomegaly.", "Markedly enlarged heart."),
}
_PRESENT = ("{finding}.", "There is a {lower}.")
_OPACITY = (
    "{Side} {zone} zone opacity.",
    "Opacity in the {side} {zone} zone.",
    "Focal opacity in the {side} {zone} zone.",
)
_CLEAR = ("The lungs are clear.", "No focal opacity.", "Lungs are clear.")
_NO_EFFUSION = ("No pleural effusion.", "No effusion.")
_NO_PNEUMOTHORAX = ("No pneumothorax.",)
_NEITHER = ("No pleural effusion or pneumothorax.", "No effusion or pneumothorax.")


def _one(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _told(rng: np.random.Generator, finding: str) -> str:
    return _one(rng, _PRESENT).format(finding=finding, lower=finding[0].lower() + finding[1:])


def report(anatomy: Anatomy, rng: np.random.Generator) -> str:
    """Tell the findings: three to seven short sentences, wording drawn from templates, order heart, lungs, pleura."""
    lungs = [_one(rng, _OPACITY).format(side=s, Side=s.capitalize(), zone=z) for s, z in anatomy.opacity]
    lungs = lungs or [_one(rng, _CLEAR)]
    pleura = [_told(rng, f"{size.capitalize()} {side} pleural effusion") for side, size in anatomy.effusion.items()]
    pleura += [_told(rng, f"{size.capitalize()} {side} pneumothorax") for side, size in anatomy.pneumothorax.items()]
    if not pleura:
        pleura = [_one(rng, _NEITHER)]
    elif rng.random() < 0.5:
        pleura += [] if anatomy.effusion else [_one(rng, _NO_EFFUSION)]
        pleura += [] if anatomy.pneumothorax else [_one(rng, _NO_PNEUMOTHORAX)]
    return " ".join([_one(rng, _HEART_WORDS[anatomy.heart]), *lungs, *pleura])


def parse(text: str) -> dict[str, bool]:
    """Read a report back into the findings of `FINDINGS`; what is not said, or is denied, is False."""
    present = set()
    for sentence in re.split(r"[.\n;]+", text.lower()):
        words = sentence.split()
        if not words or words[0] in ("no", "without") or "not" in words:
            continue
        sides = [side for side in SIDES if side in words or "bilateral" in words]
        if "cardiomegaly" in words or ("enlarged" in words and "heart" in words):
            present.add("cardiomegaly")
        for what in ("effusion", "pneumothorax"):
            if what in words:
                present |= {f"{side} {what}" for side in sides}
        if "opacity" in words:
            present |= {f"{side} {zone} opacity" for side in sides for zone in ZONES if zone in words}
    return {name: name in present for name in FINDINGS}
