"""The embedded studies: synthetic chest X-rays and tiles of a real slide, both endless and with fixed splits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from medim.data import pathology, phantom
from medim.data.studies import Study

DOMAINS = {"xray": phantom.study, "pathology": pathology.study}
PARSERS = {"xray": phantom.parse, "pathology": pathology.parse}
XRAYS_IN_TEN = 7  # the X-ray's findings have sides and zones: it needs more of the studies


def domain_of(index: int, xrays_in_ten: int = XRAYS_IN_TEN) -> str:
    """Which domain the `index`-th study of the mixture has."""
    return "xray" if index % 10 < xrays_in_ten else "pathology"


def study(
    seed: int,
    index: int,
    split: str = "train",
    lungs: phantom.Outlines = "ellipse",
    xrays_in_ten: int = XRAYS_IN_TEN,
) -> Study:
    """The `index`-th study of the mixture, a pure function of its arguments; `lungs` is the X-rays' outlines."""
    if domain_of(index, xrays_in_ten) == "xray":
        return phantom.study(seed, index, split, lungs)
    return pathology.study(seed, index, split)


def studies(
    count: int,
    split: str = "train",
    seed: int = 0,
    lungs: phantom.Outlines = "ellipse",
    xrays_in_ten: int = XRAYS_IN_TEN,
) -> Iterator[Callable[[], Study]]:
    """The first `count` studies of the mixture; each is made when it is called."""
    return (partial(study, seed, index, split, lungs, xrays_in_ten) for index in range(count))
