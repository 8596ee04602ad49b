"""Distance between two sets of feature vectors, each taken as a Gaussian."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def frechet_distance(first: Float[ndarray, "N D"], second: Float[ndarray, "M D"]) -> float:
    """|m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) of means m and covariances S; 0 for equal sets.

    Source: Heusel et al. 1706.08500, equation 6. With centred rows A / sqrt(N-1) and B / sqrt(M-1), S1 S2 has the
    non-zero eigenvalues of (A B')(A B')', so that the last trace is the sum of the singular values of A B': N x M, not
    D x D, and no square root of a singular matrix.

    Raises:
        ValueError: a set of fewer than two vectors has no covariance.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError(f"{len(first)} and {len(second)} vectors: each set must have two or more")
    a, b = (np.asarray(one, dtype=np.float64) for one in (first, second))
    offset = a.mean(0) - b.mean(0)
    a, b = ((one - one.mean(0)) / np.sqrt(len(one) - 1) for one in (a, b))
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(max(0.0, offset @ offset + np.square(a).sum() + np.square(b).sum() - 2 * cross))
