"""Embedded pathology: tiles of a real H&E slide, and reports written from what is measured on each tile.

The picture is OpenSlide's CMU-1-Small-Region (skin, 0.499 um per pixel, CC0 1.0).
No pathologist wrote these reports: `measure` reads colour areas, `findings` bands them, `report` words
the bands and `parse` reads them back, so what a model writes can be checked against what its picture shows.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from importlib import resources

import numpy as np
import PIL.Image
import PIL.ImageDraw
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from scipy.ndimage import gaussian_filter, uniform_filter

from medim.data.studies import Image, Study
from medim.errors import UserError

TILE = 96  # pixels a side, unless another is asked for: 48 um
SPACING = (0.000499, 0.000499)  # mm per pixel


@dataclass(frozen=True)
class Box:
    """Pixels of the slide, ends excluded, and the shipped region (a JPEG of that name) that holds them."""

    region: str
    top: int
    bottom: int
    left: int
    right: int


# Where each shipped file lies in the slide (docs/make_pathology_regions.py cuts them so).
REGIONS = {"train": Box("train", 60, 2150, 580, 1900), "test": Box("test", 2184, 2967, 480, 1880)}
# At least 30 rows lie between any two splits, so no pixel and no nucleus is shared.
SPLITS = {
    "train": Box("train", 60, 1790, 580, 1900),
    "validation": Box("train", 1820, 2150, 580, 1900),
    "test": REGIONS["test"],
}
# Horny layers (keratin) are as dark as nuclei but have none: no tile touches them. (column, row) in slide.
KERATIN = (
    (
        (1440, 915),
        (1640, 890),
        (1850, 1270),
        (1800, 1480),
        (1350, 1900),
        (1190, 1830),
        (1150, 1620),
        (1300, 1230),
    ),
    ((1270, 1960), (1350, 1990), (1330, 2100), (1220, 2150), (1180, 2080)),
)


@dataclass(frozen=True)
class Measurement:
    """Raw figures of one tile, all in [0, 1].

    Attributes:
        nuclei: area of nuclei over the area of tissue.
        epithelium: area of purple tissue (epithelium with its nuclei) over the area of tissue.
        collagen: area of pink tissue over the area of tissue; with `epithelium` it makes 1.
        white: area without tissue over the whole tile.
    """

    nuclei: float
    epithelium: float
    collagen: float
    white: float


# Bands: two cuts a group. Cellularity is cut at the terciles of train tiles.
NUCLEI_CUTS = (0.13, 0.215)
EPITHELIUM_CUTS = (0.25, 0.70)
WHITE_CUTS = (0.02, 0.12)

# Cellularity speaks of area, not of number: that is measured, and a few large nuclei fill much of a tile.
_PHRASES: dict[str, tuple[str, ...]] = {
    "low cellularity": ("low cellularity", "small nuclear area", "nuclei take little of the area"),
    "moderate cellularity": ("moderate cellularity", "moderate nuclear area", "nuclei take some of the area"),
    "high cellularity": ("high cellularity", "large nuclear area", "nuclei take much of the area"),
    "collagen": ("predominantly collagen", "mostly pink collagen", "dermal collagen fills the field"),
    "mixed tissue": (
        "both epithelium and collagen",
        "epithelium next to collagen",
        "mixed epithelium and collagen",
    ),
    "epithelium": (
        "predominantly squamous epithelium",
        "mostly purple epithelium",
        "squamous epithelium fills the field",
    ),
    "no white space": ("no white space", "without white space", "white space is absent"),
    "some white space": ("some white space", "a little white space", "small white gaps"),
    "prominent white space": ("prominent white space", "much white space", "large white gaps"),
}
FINDINGS: tuple[str, ...] = tuple(_PHRASES)
_OPENINGS = (
    "Hematoxylin and eosin stained skin",
    "Skin, hematoxylin and eosin stain",
    "H&E section of skin",
    "Skin biopsy, H&E",
)


def measure(image: PIL.Image.Image) -> Measurement:
    """Area fractions of one H&E tile by optical density: hematoxylin absorbs red light, eosin does not.

    Every map is smoothed before it is cut, so the slight blur of a VQ reconstruction rarely moves a band.
    Without any tissue the three fractions of tissue are 0.
    """
    rgb: Float[ndarray, "H W 3"] = np.asarray(image.convert("RGB"), dtype=np.float32)
    density = -np.log((rgb[..., :2] + 1) / 244)  # red and green; 243 is the slide's white
    red, green = gaussian_filter(density, (1.5, 1.5, 0)).transpose(2, 0, 1)
    tissue = green > 0.22
    area = max(int(tissue.sum()), 1)
    # Darker than their surroundings too: some cytoplasm is as dark as a pale nucleus is elsewhere.
    nuclei = tissue & (red > 0.65) & (red > 1.1 * gaussian_filter(red, 10))
    # Clipped at the density of cytoplasm, spread wider than a nucleus: a lone cell leaves collagen collagen.
    weight = gaussian_filter(tissue.astype(np.float32), 6) + 1e-3
    cytoplasm = gaussian_filter(np.minimum(red, 0.6) * tissue, 6) / weight
    purple = tissue & (cytoplasm > 0.47)
    return Measurement(
        nuclei=float(nuclei.sum() / area),
        epithelium=float(purple.sum() / area),
        collagen=float((tissue & ~purple).sum() / area),
        white=float(1 - tissue.mean()),
    )


def findings(measurement: Measurement) -> dict[str, bool]:
    """Which of `FINDINGS` hold: one of three bands each for cellularity, for tissue and for white space."""
    groups = (
        (measurement.nuclei, NUCLEI_CUTS),
        (measurement.epithelium, EPITHELIUM_CUTS),
        (measurement.white, WHITE_CUTS),
    )
    bands = [sum(value > cut for cut in cuts) for value, cuts in groups]
    return {name: i % 3 == bands[i // 3] for i, name in enumerate(FINDINGS)}


def report(findings: dict[str, bool], rng: np.random.Generator) -> str:
    """Three or four short sentences, each true finding stated once; wording and order drawn from `rng`."""
    said = [_PHRASES[name] for name in FINDINGS if findings[name]]
    clauses = [str(rng.choice(said[i])) for i in rng.permutation(len(said))]
    opening = str(rng.choice(_OPENINGS))
    if rng.random() < 0.5:
        clauses = [opening, *clauses]
    elif clauses:
        clauses[0] = f"{opening}, {clauses[0]}"
    return " ".join(f"{clause[0].upper()}{clause[1:]}." for clause in clauses)


def parse(report: str) -> dict[str, bool]:
    """Read a report's words back: True for each finding that one of its phrasings states, else False."""
    words = " ".join(report.lower().split())
    return {name: _pattern(name).search(words) is not None for name in FINDINGS}


@functools.cache
def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(r"\b(?:" + "|".join(map(re.escape, _PHRASES[name])) + r")\b")


@functools.cache
def _pixels(region: str) -> UInt8[ndarray, "H W 3"]:
    with (resources.files("medim") / "assets" / "pathology" / f"{region}.jpg").open("rb") as file:
        return np.asarray(PIL.Image.open(file).convert("RGB"))


def _crop(split: str) -> UInt8[ndarray, "H W 3"]:
    """The split's own pixels, a view into its region."""
    box = SPLITS[split]
    origin = REGIONS[box.region]
    return _pixels(box.region)[
        box.top - origin.top : box.bottom - origin.top, box.left - origin.left : box.right - origin.left
    ]


@functools.cache
def _corners(split: str, tile: int) -> Int[ndarray, " N"]:
    """Flat indices in the split's crop of tile corners (top left): much tissue, no keratin, little ink."""
    pixels, box = _crop(split), SPLITS[split]
    keratin = PIL.Image.new("L", (box.right - box.left, box.bottom - box.top))
    for polygon in KERATIN:
        PIL.ImageDraw.Draw(keratin).polygon([(x - box.left, y - box.top) for x, y in polygon], fill=1)
    tissue = uniform_filter((pixels[..., 1] < 200).astype(np.float32), tile) > 0.5
    red, green, _ = pixels.astype(np.int16).transpose(2, 0, 1)
    ink = uniform_filter((green > red + 20).astype(np.float32), tile) > 0.005
    allowed = tissue & ~ink & (uniform_filter(np.asarray(keratin, dtype=np.float32), tile) < 1e-4)
    corners = np.zeros_like(allowed)
    half = tile // 2  # uniform_filter centres a window of even size on its upper middle: rows i - half .. i + half - 1
    rows, columns = allowed.shape[0] - tile + 1, allowed.shape[1] - tile + 1
    corners[:rows, :columns] = allowed[half : half + rows, half : half + columns]
    return np.flatnonzero(corners)


def position(seed: int, index: int, split: str, pixels: int = TILE) -> tuple[int, int]:
    """(row, column) in the slide of the top left pixel of the tile that `study` cuts."""
    return _position(_generator(seed, index, split), split, pixels)


def _position(rng: np.random.Generator, split: str, pixels: int) -> tuple[int, int]:
    box = SPLITS[split]
    row, column = divmod(int(rng.choice(_corners(split, pixels))), box.right - box.left)
    return box.top + row, box.left + column


def _generator(seed: int, index: int, split: str) -> np.random.Generator:
    if split not in SPLITS:
        raise UserError(f"split {split!r} of the pathology tiles does not exist: use one of {', '.join(SPLITS)}")
    if seed < 0 or index < 0:
        raise UserError(f"seed {seed} and index {index} of a pathology tile must not be negative: use 0 or more")
    return np.random.default_rng((seed, index, list(SPLITS).index(split)))


def study(seed: int, index: int, split: str, pixels: int = TILE) -> Study:
    """Tile `index` of a split, `pixels` of 0.499 um a side, in one of 8 orientations, with its measured report.

    A pure function of its arguments; the splits share no pixel.

    Raises:
        UserError: for an unknown split, or a negative seed or index.
    """
    rng = _generator(seed, index, split)
    top, left = _position(rng, split, pixels)
    box = SPLITS[split]
    tile = _crop(split)[top - box.top :, left - box.left :][:pixels, :pixels]
    turns, mirrored = int(rng.integers(4)), bool(rng.integers(2))
    tile = np.rot90(tile[:, ::-1] if mirrored else tile, turns)
    image = PIL.Image.fromarray(np.ascontiguousarray(tile))
    name = f"pathology-{split}-{index:06d}"
    return Study(
        id=name,
        patient_id="CMU-1",
        images=(Image("pathology", image, view="H&E", spacing=SPACING),),
        report=report(findings(measure(image)), rng),
        split=split,
        source="CMU-1-Small-Region",
    )
