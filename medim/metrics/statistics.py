"""Figures as functions of sums over studies, so that each one has an interval and two systems a paired test.

A corpus figure such as BLEU or micro-F1 is no mean over studies, but it is a function of sums over studies: of matched
n-grams, of true positives. Whoever keeps the summands can draw studies again without scoring anything again.
Shape letters: N studies, K summands, C clusters (patients), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy import ndarray


def _ratio(sums: Float[ndarray, "*R 2"]) -> Float[ndarray, "*R"]:
    part, whole = np.moveaxis(sums, -1, 0)
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)


def _f1(sums: Float[ndarray, "*R 3"]) -> Float[ndarray, "*R"]:
    tp, fp, fn = np.moveaxis(sums, -1, 0)
    return _ratio(np.stack([2 * tp, 2 * tp + fp + fn], axis=-1))


def _bleu(sums: Float[ndarray, "*R K"]) -> Float[ndarray, "*R"]:
    """Papineni et al. 2002 without smoothing: matches and totals of orders 1 to k, length of outputs, of references."""
    order = (sums.shape[-1] - 2) // 2
    matches, totals = sums[..., :order], sums[..., order : 2 * order]
    made, wanted = sums[..., -2], sums[..., -1]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.exp(np.log(matches / totals).mean(-1))
        penalty = np.exp(np.minimum(0.0, 1 - wanted / made))
    return np.where((matches > 0).all(-1), penalty * precision, 0.0)


def _meteor(sums: Float[ndarray, "*R 6"]) -> Float[ndarray, "*R"]:
    """Denkowski and Lavie 2014: matches made and wanted, lengths made and wanted, chunks, matched words."""
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(sums[..., :2] / sums[..., 2:4], -1, 0)
        f_mean = 1 / (0.15 / precision + 0.85 / recall)
        broken = np.where(sums[..., 5] > 0, sums[..., 4] / sums[..., 5], 0.0)
    return np.where((sums[..., :2] > 0).all(-1), f_mean * (1 - 0.6 * broken**0.2), 0.0)


FORMS: dict[str, Callable[[Float[ndarray, "*R K"]], Float[ndarray, "*R"]]] = {
    "mean": _ratio,  # sum, count
    "f1": _f1,  # true positives, false positives, false negatives
    "bleu": _bleu,
    "meteor": _meteor,
}


@dataclass(frozen=True)
class Sums:
    """What each study adds, and how the sum becomes a figure.

    Attributes:
        rows: [N, K]
        form: a name of `FORMS`.

    Example:
        >>> Sums.mean([0.0, 1.0]).value
        0.5
    """

    rows: Float[ndarray, "N K"]
    form: str = "mean"

    @classmethod
    def mean(cls, values: Sequence[float]) -> Sums:
        """Of one value a study; NaN where it is undefined: such a study does not count."""
        found = np.asarray(values, dtype=float)
        return cls(np.stack([np.where(np.isfinite(found), found, 0.0), np.isfinite(found)], axis=-1).astype(float))

    @property
    def value(self) -> float:
        """The figure over all studies; NaN where undefined."""
        return float(FORMS[self.form](self.rows.sum(0)))

    def drawn(self, weights: Float[ndarray, "R C"], clusters: Sequence[Hashable]) -> Float[ndarray, "R"]:
        """The figure of each resample; `weights` says how often each cluster is in it."""
        return FORMS[self.form](weights @ _by_cluster(self.rows, clusters))


def weights(clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000) -> Float[ndarray, "R C"]:
    """How often each cluster is drawn when as many as there are come back, with replacement (Efron 1979)."""
    count = len(set(clusters))
    return np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=resamples).astype(float)


def interval(
    sums: Sums, clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval, whole clusters drawn: studies of one patient are not independent.

    Args:
        clusters: of each study: its patient where known, else itself.
    """
    return _quantiles(sums.drawn(weights(clusters, seed, resamples), clusters), level)


@dataclass(frozen=True)
class Difference:
    """The second system's figure minus the first's.

    Attributes:
        p: two-sided; the share of resamples on the other side of zero, at least 2 / (R + 1).
    """

    value: float
    low: float
    high: float
    p: float


def paired(
    first: Sums, second: Sums, clusters: Sequence[Hashable], seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> Difference:
    """Paired bootstrap of two systems on the same studies (Koehn 2004): both are drawn together.

    Raises:
        ValueError: other numbers of studies, or another form.
    """
    if first.rows.shape != second.rows.shape or first.form != second.form:
        raise ValueError(f"{first.form} {first.rows.shape} and {second.form} {second.rows.shape}: give the same figure")
    drawn = weights(clusters, seed, resamples)
    differences = second.drawn(drawn, clusters) - first.drawn(drawn, clusters)
    known = differences[np.isfinite(differences)]
    below, above = (known <= 0).sum(), (known >= 0).sum()
    p = min(1.0, 2 * (min(below, above) + 1) / (len(known) + 1))
    return Difference(second.value - first.value, *_quantiles(differences, level), float(p))


def holm(p_values: Sequence[float]) -> list[float]:
    """The same, corrected for their number (Holm 1979); in the order given."""
    found, worst = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p_values[index]))
        found[index] = worst
    return found


def _by_cluster(rows: Float[ndarray, "N K"], clusters: Sequence[Hashable]) -> Float[ndarray, "C K"]:
    """Sums of the clusters, in the order in which they come first."""
    place = {name: index for index, name in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(place), rows.shape[1]))
    np.add.at(sums, [place[name] for name in clusters], rows)
    return sums


def _quantiles(drawn: Float[ndarray, "R"], level: float) -> tuple[float, float]:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
