"""Planted copies are found, and independent draws give the baseline; retrieval against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest

from medim.metrics.memorisation import copy_rate, cosine, differing, nearest
from medim.metrics.retrieval import ranks, retrieval


def test_planted_copies_are_found_in_parts_of_the_training_set() -> None:
    rng = np.random.default_rng(0)
    training, made = rng.normal(size=(500, 24)), rng.normal(size=(40, 24))
    made[:7] = 3.0 * training[100:107]  # another scale is the same direction
    found = nearest(made, np.split(training, 5))
    assert found.index[:7].tolist() == list(range(100, 107)) and found.distance[:7] == pytest.approx(np.zeros(7))
    held_out = nearest(rng.normal(size=(300, 24)), [training]).distance
    rate = copy_rate(found.distance, held_out)
    assert rate.rate.value == 7 / 40 and rate.baseline.value < 0.04


def test_independent_draws_are_copies_as_often_as_held_out_ones() -> None:
    rng = np.random.default_rng(1)
    training = rng.normal(size=(400, 6))
    made, held_out = (nearest(rng.normal(size=(1000, 6)), [training]).distance for _ in range(2))
    rate = copy_rate(made, held_out, 0.05)
    assert rate.rate.value == pytest.approx(0.05, abs=0.025) and rate.baseline.value == pytest.approx(0.05, abs=0.03)
    with pytest.raises(ValueError, match="4 or more"):
        copy_rate(made, held_out[:3])


def test_codes_that_differ() -> None:
    training = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    found = nearest(np.array([[1, 2, 0, 0], [5, 6, 7, 8]]), [training], differing)
    assert found.index.tolist() == [0, 1] and found.distance.tolist() == [0.5, 0.0]


def test_cosine() -> None:
    assert cosine(np.array([[1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 0.0]])) == pytest.approx(np.array([[1.0, 0.0]]))


def test_ranks_by_hand_with_ties() -> None:
    likeness = np.array([[0.9, 0.1, 0.2], [0.8, 0.5, 0.1], [0.4, 0.4, 0.4]])
    assert ranks(likeness).tolist() == [0, 1, 1]


def test_retrieval() -> None:
    rng = np.random.default_rng(2)
    images = rng.normal(size=(50, 8))
    perfect = retrieval(images, 2 * images)
    assert perfect["image_to_text_recall@1"].value == 1.0 and perfect["text_to_image_median_rank"] == 1.0
    chance = retrieval(images, rng.normal(size=(50, 8)))
    assert chance["image_to_text_recall@10"].value == pytest.approx(0.2, abs=0.15)
    same = retrieval(np.ones((50, 8)), np.ones((50, 8)))  # all alike: no more than chance
    assert same["image_to_text_recall@10"].value == 0.0 and same["image_to_text_median_rank"] == 26.0
    with pytest.raises(ValueError, match="as many images as texts"):
        retrieval(images, images[:3])
