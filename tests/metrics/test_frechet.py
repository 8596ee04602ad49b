"""The Fréchet distance against closed forms and against scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm

from medim.metrics.frechet import frechet_distance


def test_one_dimension_is_means_and_deviations() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2 with the deviations of N - 1."""
    a, b = np.array([[0.0], [2.0], [4.0]]), np.array([[1.0], [7.0]])
    wanted = (2 - 4) ** 2 + (2 - np.sqrt(18)) ** 2
    assert frechet_distance(a, b) == pytest.approx(wanted)


def test_agrees_with_the_matrix_square_root() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(60, 5)), rng.normal(size=(40, 5)) @ rng.normal(size=(5, 5)) + 0.3
    s, t = np.cov(a.T), np.cov(b.T)
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)


def test_equal_sets_have_none_and_one_vector_is_refused() -> None:
    a = np.random.default_rng(0).normal(size=(10, 30))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="two or more"):
        frechet_distance(a, a[:1])
