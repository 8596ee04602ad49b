"""Are generated images copies of training images? Nearest neighbours, and how often they are nearer than chance has it.

Shape letters: N queries, T training images, D features, P code positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from medim.metrics.statistics import Sums

Distance = Callable[[ndarray, ndarray], Float[ndarray, "N T"]]


def cosine(queries: Float[ndarray, "N D"], training: Float[ndarray, "T D"]) -> Float[ndarray, "N T"]:
    """1 - cosine of the angle between feature vectors."""
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (queries, training))
    return 1 - a @ b.T


def differing(queries: Int[ndarray, "N P"], training: Int[ndarray, "T P"]) -> Float[ndarray, "N T"]:
    """Share of positions whose codes differ."""
    return np.stack([(query != training).mean(1) for query in queries]).astype(float)


@dataclass(frozen=True)
class Nearest:
    """Of each query, the training image that is nearest.

    Attributes:
        index: [N] its number.
        distance: [N]
    """

    index: Int[ndarray, "N"]
    distance: Float[ndarray, "N"]


def nearest(queries: ndarray, training: Iterable[ndarray], distance: Distance = cosine) -> Nearest:
    """The nearest of training images that come in parts, so that they need not fit in memory together."""
    best, index, seen = np.full(len(queries), np.inf), np.full(len(queries), -1), 0
    for part in training:
        found = distance(queries, part)
        place = found.argmin(1)
        value = found[np.arange(len(queries)), place]
        closer = value < best
        best, index = np.where(closer, value, best), np.where(closer, place + seen, index)
        seen += len(part)
    return Nearest(index, best)


@dataclass(frozen=True)
class CopyRate:
    """Share of images nearer to a training image than nearly all held-out images are.

    Attributes:
        threshold: the quantile of held-out distances below which an image counts as a copy.
        rate: of the generated images.
        baseline: of other held-out images, which no model has made: about the quantile.
    """

    threshold: float
    rate: Sums
    baseline: Sums


def copy_rate(made: Float[ndarray, "N"], held_out: Float[ndarray, "H"], quantile: float = 0.01) -> CopyRate:
    """From distances to the nearest training image. Held-out images of even number set the threshold, odd ones test it.

    Raises:
        ValueError: fewer than four held-out images.
    """
    if len(held_out) < 4:
        raise ValueError(f"{len(held_out)} held-out images: give 4 or more")
    threshold = float(np.quantile(held_out[::2], quantile))
    rates = (Sums.mean((one < threshold).astype(float).tolist()) for one in (made, held_out[1::2]))
    return CopyRate(threshold, *rates)
