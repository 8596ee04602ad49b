"""The embedded studies: synthetic chest X-rays and tiles of a real slide, both endless and with fixed splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

from medim.data import pathology, phantom
from medim.data.studies import Study

SIDES = (32, 256)  # pixels a side: the least and the most that can be drawn


class Drawn(Protocol):
    """A domain's `index`-th study."""

    def __call__(self, seed: int, index: int, split: str, *, pixels: int = ...) -> Study: ...


DOMAINS: dict[str, Drawn] = {"xray": phantom.study, "pathology": pathology.study}
PARSERS = {"xray": phantom.parse, "pathology": pathology.parse}
XRAYS_IN_TEN = 7  # the X-ray's findings have sides and zones: it needs more of the studies


def side_for(resolution: int) -> int:
    """Pixels a side of the pictures that a tokenizer of this resolution is shown: its own, where they can be drawn so.

    Example:
        >>> side_for(128), side_for(512)
        (128, 256)
    """
    return min(max(resolution, SIDES[0]), SIDES[1]) // 2 * 2


def domain_of(index: int, xrays_in_ten: int = XRAYS_IN_TEN) -> str:
    """Which domain the `index`-th study of the mixture has."""
    return "xray" if index % 10 < xrays_in_ten else "pathology"


def study(
    seed: int,
    index: int,
    split: str = "train",
    lungs: phantom.Outlines = "ellipse",
    xrays_in_ten: int = XRAYS_IN_TEN,
    pixels: int = phantom.SIZE,
) -> Study:
    """The `index`-th study of the mixture, a pure function of its arguments.

    Args:
        lungs: the X-rays' outlines.
        xrays_in_ten: how many of ten studies are X-rays.
        pixels: of a side of the picture; a tile has a wider field then, an X-ray is drawn finer.
    """
    if domain_of(index, xrays_in_ten) == "xray":
        return phantom.study(seed, index, split, lungs, pixels)
    return pathology.study(seed, index, split, pixels)


def studies(count: int, split: str = "train", seed: int = 0, **how: Any) -> Iterator[Callable[[], Study]]:
    """The first `count` studies of the mixture, of which `study` says `how`; each is made when it is called."""
    return (partial(study, seed, index, split, **how) for index in range(count))
