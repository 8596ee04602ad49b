"""Pictures to train an image tokenizer on: which one is in which place of which step is a pure function."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pydantic
import torch
from jaxtyping import Float
from torch import Tensor

from medim.config import options
from medim.data.augment import Augmentation
from medim.data.embedded import DOMAINS, side_for
from medim.data.sources import SOURCES
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.pictures import read_picture
from medim.tokenization.image import Fit, image_to_tensor, prepare_image
from medim.vocabulary import MODALITIES

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".webp", ".bmp")
HELD_OUT = 20  # one picture in so many is held out where a source has no splits
ATTEMPTS = 20  # pictures tried for one place before the source is called broken
XRAY_SHARE = 0.55  # of the embedded pictures
ROTATED = ("pathology",)  # a tile has no up


@options
class PictureOptions:
    """Where pictures come from.

    Attributes:
        source: demo (embedded X-rays and tiles, drawn as they are needed), images (any folder of pictures), or a reader
            of `medim prepare`.
        root: the folder, unless source is demo.
        options: the reader's own options.
        modality: of all pictures of source images: gray ones stay gray.
        mirror: mirror every second picture.
        rotate: turn tiles by multiples of 90 degrees.
        augment: turn, move, scale and recolour each picture a little, as `medim prepare --views` does.
        limit: use so many pictures at most; 0 uses all.
    """

    source: str = "demo"
    root: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    modality: str = "pathology"
    mirror: bool = True
    rotate: bool = True
    augment: bool = False
    limit: int = 0


@dataclass(frozen=True)
class Pictures:
    """Training pictures by place and held-out ones by modality.

    Attributes:
        draw: called with a random generator; an image of the training split.
        held_out: called with a number; at most so many held-out images of each modality.
    """

    options: PictureOptions
    resolution: int
    fit: Fit
    seed: int
    draw: Callable[[np.random.Generator], Image]
    held_out: Callable[[int], dict[str, list[Image]]]

    def picture(self, step: int, slot: int) -> PIL.Image.Image:
        """The prepared picture of a place; a file that cannot be read is warned about, and another one is drawn.

        Raises:
            UserError: one file after another cannot be read.
        """
        rng = np.random.default_rng([self.seed, step, slot])
        problem = UserError("")
        for _ in range(ATTEMPTS):
            image = self.draw(rng)
            mirrored, turns = bool(rng.integers(2)), int(rng.integers(4))
            change = Augmentation.draw(rng) if self.options.augment else None
            try:
                made = self._prepared(image, change)
            except UserError as error:
                problem = error
                warnings.warn(f"left out: {error}", stacklevel=2)
                continue
            if self.options.rotate and image.modality in ROTATED:
                made = made.rotate(90 * turns)
            return made.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT) if self.options.mirror and mirrored else made
        raise UserError(f"{ATTEMPTS} pictures in a row cannot be read, the last: {problem}")

    def batch(self, step: int, slots: range) -> Float[Tensor, "B 3 H W"]:
        """The pictures of some places of a step, in [-1, 1]."""
        return torch.stack([image_to_tensor(self.picture(step, slot)) for slot in slots])

    def test(self, count: int) -> dict[str, list[PIL.Image.Image]]:
        """At most `count` prepared held-out pictures of each modality; those that cannot be read are left out."""
        made: dict[str, list[PIL.Image.Image]] = {}
        for modality, images in self.held_out(count).items():
            for image in images:
                try:
                    made.setdefault(modality, []).append(self._prepared(image))
                except UserError as error:
                    warnings.warn(f"left out: {error}", stacklevel=2)
        return made

    def _prepared(self, image: Image, change: Augmentation | None = None) -> PIL.Image.Image:
        gray, pixels = MODALITIES[image.modality].gray, image.pixels
        if change is not None:
            pixels = change(read_picture(pixels, "black" if gray else "white").image, image.modality, image.view)
        return prepare_image(pixels, self.resolution, gray, self.fit)


def open_pictures(o: PictureOptions, resolution: int, seed: int, fit: Fit = "crop") -> Pictures:
    """The pictures of a source.

    Raises:
        UserError: the source is not known, its root or an option is wrong, or it holds no pictures.
    """
    if o.source == "demo":
        side = side_for(resolution)
        draw, held_out = partial(_draw_embedded, side), partial(_held_out_embedded, side, seed)
        return Pictures(o, resolution, fit, seed, draw, held_out)
    if o.source != "images" and o.source not in SOURCES:
        raise UserError(
            f"data.source={o.source}: unknown; one of {', '.join(dict.fromkeys(('demo', 'images', *SOURCES)))}"
        )
    if o.root is None or not Path(o.root).exists():
        raise UserError(f"data.root={o.root}: no such folder; data.source={o.source} needs the folder to read")
    if o.modality not in MODALITIES:
        raise UserError(f"data.modality={o.modality}: unknown; one of {', '.join(MODALITIES)}")
    listed = _folder(Path(o.root), o.modality) if o.source == "images" else _read(o)
    train, test = _split(listed)
    if not train:
        raise UserError(f"data.root={o.root}: data.source={o.source} finds no picture there to train on")
    if o.limit:
        train = [train[i] for i in np.random.default_rng(seed).permutation(len(train))[: o.limit]]
    return Pictures(
        o,
        resolution,
        fit,
        seed,
        lambda rng: train[rng.integers(len(train))],
        lambda count: _by_modality(test, count, seed),
    )


def _draw_embedded(side: int, rng: np.random.Generator) -> Image:
    domain = "xray" if rng.random() < XRAY_SHARE else "pathology"
    return DOMAINS[domain](0, int(rng.integers(2**32)), "train", pixels=side).images[0]


def _held_out_embedded(side: int, seed: int, count: int) -> dict[str, list[Image]]:
    return {
        name: [study(seed, index, "test", pixels=side).images[0] for index in range(count)]
        for name, study in DOMAINS.items()
    }


def _folder(root: Path, modality: str) -> Iterator[tuple[str, Image]]:
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
    return (("", Image(modality, path)) for path in files)


def _read(o: PictureOptions) -> Iterator[tuple[str, Image]]:
    source = SOURCES[o.source]
    try:
        own: Any = pydantic.TypeAdapter(source.options).validate_python(o.options)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"data.options.{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    assert o.root is not None
    for found in source.read(Path(o.root), own):
        study = found() if callable(found) else found
        if isinstance(study, Study):
            yield from ((study.split, image) for image in study.images)


def _split(listed: Iterator[tuple[str, Image]]) -> tuple[list[Image], list[Image]]:
    """Training and held-out images: by the source's splits, or every `HELD_OUT`-th where it knows none but train."""
    everything = list(listed)
    by_split: dict[str, list[Image]] = {}
    for split, image in everything:
        by_split.setdefault(split, []).append(image)
    held_out = by_split.get("test") or by_split.get("validation")
    if held_out:
        return by_split.get("train", []), held_out
    images = [image for _, image in everything]
    train = [image for number, image in enumerate(images) if number % HELD_OUT]
    return train or images, images[::HELD_OUT]


def _by_modality(images: Sequence[Image], count: int, seed: int) -> dict[str, list[Image]]:
    order = np.random.default_rng(seed).permutation(len(images))
    found: dict[str, list[Image]] = {}
    for image in itertools.islice((images[i] for i in order), 50 * count):
        chosen = found.setdefault(image.modality, [])
        if len(chosen) < count:
            chosen.append(image)
    return dict(sorted(found.items()))
