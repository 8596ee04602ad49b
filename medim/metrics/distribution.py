"""How a set of generated images differs from a set of real ones, told by feature vectors of some extractor.

Shape letters: N real and M generated vectors, D features, K nearest neighbours, S pictures, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from scipy.ndimage import gaussian_filter

SUBSETS, SUBSET = 100, 1000  # of KID, as its authors have them
MS_SSIM_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, section 3.2
SSIM_SIGMA = 1.5


def frechet_distance(first: Float[ndarray, "N D"], second: Float[ndarray, "M D"]) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m and covariances S; 0 for equal sets.

    Source: Heusel et al. 1706.08500, equation 6. With centred rows A / sqrt(N-1) and B / sqrt(M-1), S1 S2 has the
    non-zero eigenvalues of (A B')(A B')', so that the last trace is the sum of the singular values of A B': N x M, not
    D x D, and no square root of a singular matrix. Where there are more vectors than features, D x D roots of the two
    covariances take the place of A and B.

    Raises:
        ValueError: a set of fewer than two vectors has no covariance.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} vectors: each set must have two or more")
    a, b = (np.asarray(one, dtype=np.float64) for one in (first, second))
    offset = a.mean(0) - b.mean(0)
    a, b = ((one - one.mean(0)) / np.sqrt(len(one) - 1) for one in (a, b))
    spread = np.square(a).sum() + np.square(b).sum()
    if min(len(a), len(b)) > a.shape[1]:
        a, b = (np.asarray(np.linalg.qr(one, mode="r")) for one in (a, b))  # R'R = A'A
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(0.0, offset @ offset + spread - 2 * cross))


def fid_infinity(
    real: Float[ndarray, "N D"], made: Float[ndarray, "M D"], seed: int = 0, points: int = 15
) -> tuple[float, float]:
    """FID as it would be of endlessly many generated images, and its standard error: the intercept of FID over 1/n.

    FID of n vectors is too high by about c / n, with a c of its own for each model, so that two systems may change
    places with n (Chong and Forsyth 1911.07023, section 3). Subsets of n vectors, n evenly spaced from a third of M to
    M, are drawn without replacement; the real set stays whole, and so does what its size adds.

    Raises:
        ValueError: fewer than 12 generated vectors.
    """
    if len(made) < 12:
        raise ValueError(f"{len(made)} vectors: give 12 or more")
    chance = np.random.default_rng(seed)
    sizes = np.linspace(max(4, len(made) // 3), len(made), points).astype(int)
    found = [frechet_distance(real, made[chance.permutation(len(made))[:n]]) for n in sizes]
    design = np.stack([np.ones(points), 1 / sizes], axis=1)
    (intercept, slope), residual, *_ = np.linalg.lstsq(design, np.array(found), rcond=None)
    del slope
    variance = float(residual[0]) / (points - 2) if len(residual) else 0.0
    return float(intercept), float(np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0]))


@dataclass(frozen=True)
class KID:
    """Squared maximum mean discrepancy; 0 in expectation for one distribution, and then as often below it as above.

    Attributes:
        value: of the whole sets.
        mean, deviation: over subsets, as most papers give it.
    """

    value: float
    mean: float
    deviation: float


def kid(
    real: Float[ndarray, "N D"], made: Float[ndarray, "M D"], seed: int = 0, subsets: int = SUBSETS, size: int = SUBSET
) -> KID:
    """Kernel inception distance: unbiased MMD^2 by the kernel (x.y / D + 1)^3 (Binkowski et al. 1801.01401, eq. 3).

    Args:
        size: of a subset, or as large as the smaller set.

    Raises:
        ValueError: a set of fewer than two vectors.
    """
    if min(len(real), len(made)) < 2:
        raise ValueError(f"{len(real)} and {len(made)} vectors: each set must have two or more")
    a, b = (np.asarray(one, dtype=np.float64) for one in (real, made))
    chance, size = np.random.default_rng(seed), min(size, len(a), len(b))
    parts = []
    for _ in range(subsets):
        some = (one[chance.choice(len(one), size, replace=False)] for one in (a, b))
        parts.append(_mmd(*some))
    parts = parts or [float("nan")]
    return KID(_mmd(a, b), float(np.mean(parts)), float(np.std(parts)))


def _mmd(a: Float[ndarray, "N D"], b: Float[ndarray, "M D"]) -> float:
    def kernel(x: Float[ndarray, "N D"], y: Float[ndarray, "M D"]) -> Float[ndarray, "N M"]:
        return (x @ y.T / x.shape[1] + 1) ** 3

    aa, bb, ab = kernel(a, a), kernel(b, b), kernel(a, b)
    n, m = len(a), len(b)
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


@dataclass(frozen=True)
class PRDC:
    """Of each generated vector whether it is among the real ones, of each real one whether it is among the generated.

    Attributes:
        precise: [M] it lies within the K-th neighbour's distance of a real one; the mean is precision.
        dense: [M] within how many such balls, over K; the mean is density, which may be above 1.
        recalled: [N] the real one lies within such a ball of a generated one; the mean is recall.
        covered: [N] a generated one lies within its ball; the mean is coverage.
    """

    precise: Bool[ndarray, "M"]
    dense: Float[ndarray, "M"]
    recalled: Bool[ndarray, "N"]
    covered: Bool[ndarray, "N"]


def prdc(real: Float[ndarray, "N D"], made: Float[ndarray, "M D"], k: int = 5) -> PRDC:
    """Precision and recall (Kynkäänniemi et al. 1904.06991), density and coverage (Naeem et al. 2002.09797).

    Raises:
        ValueError: no more than K vectors in a set.
    """
    if min(len(real), len(made)) <= k:
        raise ValueError(f"{len(real)} and {len(made)} vectors: give more than k={k}")
    a, b = (np.asarray(one, dtype=np.float64) for one in (real, made))
    ball_a, ball_b = (np.partition(distances(one, one), k, axis=1)[:, k] for one in (a, b))
    between = distances(a, b)
    near, far = (np.asarray(between < ball) for ball in (ball_a[:, None], ball_b[None]))
    covered = np.asarray(between.min(1) < ball_a)
    precise, recalled = (np.asarray(one) for one in (near.any(0), far.any(1)))
    return PRDC(precise, near.sum(0) / k, recalled, covered)


def distances(a: Float[ndarray, "N D"], b: Float[ndarray, "M D"]) -> Float[ndarray, "N M"]:
    """Euclidean; exactly 0 for equal vectors of one set against itself."""
    squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    if a is b:
        np.fill_diagonal(squared, 0.0)
    return np.sqrt(np.maximum(squared, 0.0))


def inception_score(probabilities: Float[ndarray, "M C"], splits: int = 10) -> tuple[float, float]:
    """exp of the mean KL divergence of p(y|x) from p(y), mean and deviation over splits (Salimans 1606.03498)."""
    p = np.asarray(probabilities, dtype=np.float64)
    scores = []
    for part in np.array_split(p, min(splits, len(p))):
        mean = part.mean(0, keepdims=True)
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(part > 0, part * (np.log(part) - np.log(mean)), 0.0)
        scores.append(np.exp(terms.sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def ms_ssim(first: Float[ndarray, "H W"], second: Float[ndarray, "H W"], span: float = 255.0) -> float:
    """Multi-scale structural similarity (Wang et al. 2003): 11 x 11 Gaussian window of sigma 1.5, at most 5 scales.

    Pictures under 176 pixels have fewer scales, whose weights are scaled to sum to 1; terms below 0 count as 0.

    Raises:
        ValueError: pictures that differ in size, or of fewer than 11 pixels a side.
    """
    if first.shape != second.shape or min(first.shape) < 11:
        raise ValueError(f"{first.shape} and {second.shape}: give two pictures of one size, 11 pixels or more a side")
    scales = min(len(MS_SSIM_WEIGHTS), int(np.log2(min(first.shape) / 11)) + 1)
    weights = np.array(MS_SSIM_WEIGHTS[:scales]) / sum(MS_SSIM_WEIGHTS[:scales])
    a, b, value = np.asarray(first, float), np.asarray(second, float), 1.0
    for scale, weight in enumerate(weights):
        luminance, structure = _ssim_terms(a, b, span)
        term = (luminance * structure).mean() if scale == scales - 1 else structure.mean()
        value *= max(0.0, float(term)) ** float(weight)
        a, b = (_halved(one) for one in (a, b))
    return float(value)


def _ssim_terms(
    a: Float[ndarray, "H W"], b: Float[ndarray, "H W"], span: float
) -> tuple[Float[ndarray, "h w"], Float[ndarray, "h w"]]:
    """Luminance, and contrast times structure, where the window lies inside the picture."""

    def blur(x: Float[ndarray, "H W"]) -> Float[ndarray, "h w"]:
        return gaussian_filter(x, SSIM_SIGMA, radius=5)[5:-5, 5:-5]

    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    ma, mb = blur(a), blur(b)
    va, vb, cov = blur(a * a) - ma * ma, blur(b * b) - mb * mb, blur(a * b) - ma * mb
    return (2 * ma * mb + c1) / (ma * ma + mb * mb + c1), (2 * cov + c2) / (va + vb + c2)


def _halved(x: Float[ndarray, "H W"]) -> Float[ndarray, "h w"]:
    height, width = x.shape[0] // 2 * 2, x.shape[1] // 2 * 2
    return x[:height, :width].reshape(height // 2, 2, width // 2, 2).mean((1, 3))


def random_pairs(count: int, pairs: int, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of different numbers below `count`, drawn with replacement; none of fewer than two."""
    if count < 2:
        return []
    chance = np.random.default_rng(seed)
    first = chance.integers(count, size=pairs)
    second = (first + chance.integers(1, count, size=pairs)) % count
    return list(zip(first.tolist(), second.tolist(), strict=True))


def diversity(pictures: Sequence[Float[ndarray, "H W"]], pairs: int = 200, seed: int = 0) -> list[float]:
    """MS-SSIM of random pairs of generated pictures (Odena et al. 1610.09585): 1 if all are one picture."""
    drawn = random_pairs(len(pictures), min(pairs, 10 * len(pictures)), seed)
    return [ms_ssim(pictures[i], pictures[j]) for i, j in drawn]
