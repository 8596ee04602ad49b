"""The Fréchet distance against closed forms and against scipy's matrix square root."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from medim.metrics.distribution import (
    diversity,
    fid_infinity,
    frechet_distance,
    inception_score,
    kid,
    ms_ssim,
    prdc,
    random_pairs,
)


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


def test_more_vectors_than_features_take_another_way_to_the_same_figure() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(300, 4)), rng.normal(size=(200, 4)) * 1.5
    s, t = np.cov(a.T), np.cov(b.T)
    wanted = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(s + t - 2 * sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(wanted, rel=1e-9)


def test_fid_infinity_takes_off_what_the_sample_size_adds() -> None:
    """Two samples of one Gaussian: FID is far from 0 and falls with n, the extrapolation lies near what N adds."""
    rng = np.random.default_rng(2)
    real, made = rng.normal(size=(4000, 24)), rng.normal(size=(400, 24))
    value, error = fid_infinity(real, made)
    assert frechet_distance(real, made) > 0.3
    assert abs(value) < 0.12 and 0 < error < 0.1
    with pytest.raises(ValueError, match="12 or more"):
        fid_infinity(real, made[:11])


def test_kid_is_the_mmd_of_its_definition_and_unbiased() -> None:
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3)) + 1

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return float((a @ b / 3 + 1) ** 3)

    within = [np.mean([kernel(a, b) for i, a in enumerate(z) for j, b in enumerate(z) if i != j]) for z in (x, y)]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert kid(x, y, subsets=0).value == pytest.approx(sum(within) - 2 * between)
    same = [kid(*rng.normal(size=(2, 50, 8)), subsets=0).value for _ in range(400)]
    assert abs(np.mean(same)) < 4 * np.std(same) / 20 and min(same) < 0
    one = kid(rng.normal(size=(100, 8)), rng.normal(size=(100, 8)) + 0.5, subsets=30, size=40)
    assert one.mean == pytest.approx(one.value, abs=3 * one.deviation) and one.deviation > 0


def test_precision_recall_density_coverage_of_planted_sets() -> None:
    rng = np.random.default_rng(4)
    real = rng.normal(size=(200, 6))
    same = prdc(real, real)
    assert same.precise.all() and same.recalled.all() and same.covered.all()
    far = prdc(real, real + 100)
    assert not (far.precise.any() or far.recalled.any() or far.covered.any()) and far.dense.sum() == 0
    half = prdc(real, np.concatenate([real[:100], real[:100] + 100]))
    assert half.precise.mean() == 0.5
    repeated = prdc(real, np.repeat(real[:1], 200, axis=0) + 1e-6 * rng.normal(size=(200, 6)))
    assert repeated.precise.mean() == 1.0 and repeated.recalled.mean() < 0.02 and repeated.covered.mean() < 0.1
    turned = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    other = real + 0.3 * rng.normal(size=real.shape)
    for name in ("precise", "dense", "recalled", "covered"):
        assert (getattr(prdc(real @ turned, other @ turned), name) == getattr(prdc(real, other), name)).all()
    with pytest.raises(ValueError, match="more than k=5"):
        prdc(real[:5], real)


def test_inception_score_of_sure_and_of_unsure_networks() -> None:
    sure, unsure = np.eye(5).repeat(20, axis=0), np.full((100, 5), 0.2)
    assert inception_score(sure, splits=1)[0] == pytest.approx(5)
    assert inception_score(unsure)[0] == pytest.approx(1)


def test_ms_ssim_and_diversity() -> None:
    rng = np.random.default_rng(5)
    picture = np.kron(rng.integers(0, 255, size=(12, 12)), np.ones((8, 8))).astype(float)
    assert ms_ssim(picture, picture) == pytest.approx(1)
    noisy = [ms_ssim(picture, picture + sd * rng.normal(size=picture.shape)) for sd in (5, 30, 100)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > 0
    assert diversity([picture] * 4) == pytest.approx([1.0] * 40)
    assert random_pairs(1, 5) == [] and all(i != j for i, j in random_pairs(2, 50))
    with pytest.raises(ValueError, match="11 pixels"):
        ms_ssim(picture[:8], picture[:8])


def test_what_other_packages_say_of_the_same_features() -> None:
    """To 1e-4, as users would find it."""
    torchmetrics = pytest.importorskip("torchmetrics")
    import torch
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure
    from torchmetrics.image.kid import poly_mmd

    assert torchmetrics.__version__
    rng = np.random.default_rng(6)
    a, b = rng.normal(size=(60, 16)), rng.normal(size=(60, 16)) * 1.2 + 0.1
    theirs = float(poly_mmd(torch.tensor(a), torch.tensor(b)))
    assert kid(a, b, subsets=0).value == pytest.approx(theirs, abs=1e-6)
    low = gaussian_filter(rng.normal(size=(192, 192)), 4)
    x = (low - low.min()) / np.ptp(low) * 255
    y = np.clip(x + 12 * rng.normal(size=x.shape), 0, 255)
    pair = (torch.tensor(one, dtype=torch.float64)[None, None] for one in (x, y))
    theirs = float(multiscale_structural_similarity_index_measure(*pair, data_range=255.0))
    assert ms_ssim(x, y) == pytest.approx(theirs, abs=1e-4)


def test_prdc_says_the_same() -> None:
    compute_prdc = pytest.importorskip("prdc").compute_prdc
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=(80, 5)), rng.normal(size=(70, 5)) * 0.8
    theirs, ours = compute_prdc(a, b, nearest_k=5), prdc(a, b)
    for name, values in zip(("precision", "density"), (ours.precise, ours.dense), strict=True):
        assert values.mean() == pytest.approx(theirs[name], abs=1e-6)
    for name, values in zip(("recall", "coverage"), (ours.recalled, ours.covered), strict=True):
        assert values.mean() == pytest.approx(theirs[name], abs=1e-6)
