"""Does a text find its image among others, and an image its text? Shape letters: N studies, D features."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from medim.metrics.statistics import Sums


def ranks(likeness: Float[ndarray, "N N"]) -> Int[ndarray, "N"]:
    """Of each query (row), how many candidates are more like it than its own (the diagonal), from 0.

    Of candidates that are just as like, half count: all being equal is chance, not success.
    """
    own = np.diagonal(likeness)[:, None]
    above, equal = (likeness > own).sum(1), (likeness == own).sum(1) - 1
    return above + (equal + 1) // 2


def retrieval(
    images: Float[ndarray, "N D"], texts: Float[ndarray, "M D"], at: tuple[int, ...] = (1, 5, 10)
) -> dict[str, Sums | float]:
    """Recall among the first few and the median rank (from 1), image to text and text to image, by cosine.

    Raises:
        ValueError: other numbers of images than of texts.
    """
    if images.shape != texts.shape:
        raise ValueError(f"{images.shape} and {texts.shape}: give as many images as texts, of one width")
    a, b = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (images, texts))
    found: dict[str, Sums | float] = {}
    for name, likeness in (("image_to_text", a @ b.T), ("text_to_image", b @ a.T)):
        place = ranks(likeness)
        for k in at:
            if k < len(place):
                found[f"{name}_recall@{k}"] = Sums.mean((place < k).astype(float).tolist())
        found[f"{name}_median_rank"] = float(np.median(place) + 1)
    return found
