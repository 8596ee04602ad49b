"""Do an image and a text speak of the same findings? Precision, recall and F1 between two lists of findings.

What is read from the generated side is `predicted`, what it is held against `reference`; a finding is a name that is
True or False of a study. Shape letters: N studies, F findings, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from medim.metrics.statistics import Sums, interval

Findings = Sequence[Mapping[str, bool]]
SIDES = ("right ", "left ")  # how the name of a finding that has a side begins


@dataclass(frozen=True)
class Score:
    """Figures in [0, 1]; NaN where undefined (nothing predicted, nothing present, neither).

    Attributes:
        support: how often the reference holds a finding.
    """

    precision: float
    recall: float
    f1: float
    support: int


def per_finding(predicted: Findings, reference: Findings) -> dict[str, Score]:
    """The score of each finding over all studies, in the order of the first study's names.

    Raises:
        ValueError: no studies, lists of different lengths, or studies with different names.
    """
    guess, truth = _matrices(predicted, reference)
    columns = zip(*(c.sum(0).tolist() for c in _counts(guess, truth)), strict=True)
    return {name: _score(*column) for name, column in zip(reference[0], columns, strict=True)}


def micro(predicted: Findings, reference: Findings) -> Score:
    """All findings of all studies in one count: a frequent finding weighs more."""
    tp, fp, fn = (int(c.sum()) for c in _counts(*_matrices(predicted, reference)))
    return _score(tp, fp, fn)


def macro(predicted: Findings, reference: Findings) -> Score:
    """The mean over findings, each as heavy as the next; a finding where a figure is undefined is left out of it."""
    scores = list(per_finding(predicted, reference).values())
    precision, recall, f1 = (_mean([getattr(s, what) for s in scores]) for what in ("precision", "recall", "f1"))
    return Score(precision, recall, f1, support=sum(s.support for s in scores))


def sums(predicted: Findings, reference: Findings) -> Sums:
    """True positives, inventions and misses of each study: `micro`'s F1 with an interval of its own."""
    counts = _counts(*_matrices(predicted, reference))
    return Sums(np.stack([c.sum(1) for c in counts], axis=1).astype(float), "f1")


def sideless(findings: Findings) -> list[dict[str, bool]]:
    """The same without sides: a finding is there if it is on either.

    Example:
        >>> sideless([{"right effusion": False, "left effusion": True, "cardiomegaly": False}])
        [{'effusion': True, 'cardiomegaly': False}]
    """
    found: list[dict[str, bool]] = []
    for one in findings:
        merged: dict[str, bool] = {}
        for name, there in one.items():
            merged[_without_side(name)] = merged.get(_without_side(name), False) or there
        found.append(merged)
    return found


def side_accuracy(predicted: Findings, reference: Findings) -> Sums:
    """Of the findings that both lists have on one side only, the share that is on the same side; by chance 0.5.

    Names that begin with neither of `SIDES` have no part in it; a study without such findings does not count.
    """
    rows = []
    for guess, truth in zip(predicted, reference, strict=True):
        sided = {_without_side(name) for name in truth if name.startswith(SIDES)}
        sides = [[{side for side in SIDES if one[side + name]} for one in (guess, truth)] for name in sided]
        single = [found == wanted for found, wanted in sides if len(found) == len(wanted) == 1]
        rows.append([float(sum(single)), float(len(single))])
    return Sums(np.array(rows).reshape(-1, 2))


def _without_side(name: str) -> str:
    return next((name.removeprefix(side) for side in SIDES if name.startswith(side)), name)


def prevalence(findings: Findings) -> dict[str, float]:
    """The share of studies that has each finding.

    Example:
        >>> prevalence([{"effusion": True, "nodule": False}, {"effusion": False, "nodule": False}])
        {'effusion': 0.5, 'nodule': 0.0}
    """
    return {name: sum(one[name] for one in findings) / len(findings) for name in findings[0]}


def prevalence_gap(made: Findings, data: Findings) -> float:
    """Mean over findings of how far the share of studies that has it is from the data's: 0 is calibrated."""
    ours, real = prevalence(made), prevalence(data)
    return _mean([abs(ours[name] - real[name]) for name in real])


def chance_gap(data: Findings, studies: int) -> float:
    """The `prevalence_gap` to expect of so many other studies like the data's: E|X - Y| of shares, taken as normal."""
    p = np.array(list(prevalence(data).values()))
    return float(np.sqrt(2 / np.pi * p * (1 - p) * (1 / studies + 1 / len(data))).mean())


def shuffled_floor(predicted: Findings, reference: Findings) -> float:
    """Micro-F1 that chance pairing reaches: the mean over all N - 1 cyclic shifts of one list against the other.

    No study meets its own partner in any shift and each meets every other one once. NaN for a single study.
    """
    guess, truth = _matrices(predicted, reference)
    shifts = [_f1(_totals(np.roll(guess, k, axis=0), truth)) for k in range(1, len(truth))]
    return _mean([float(f1) for f1 in shifts])


def bootstrap_interval(
    predicted: Findings, reference: Findings, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of the micro-F1 (Efron 1979), studies drawn with replacement."""
    return interval(sums(predicted, reference), range(len(reference)), seed, resamples, level)


def _matrices(predicted: Findings, reference: Findings) -> tuple[Bool[ndarray, "N F"], Bool[ndarray, "N F"]]:
    if not reference or len(predicted) != len(reference):
        raise ValueError(f"{len(predicted)} predictions and {len(reference)} references: give as many, one at least")
    names = tuple(reference[0])
    for row in (*predicted, *reference):
        if row.keys() != reference[0].keys():
            raise ValueError(f"findings {sorted(row)} differ from {sorted(names)}: name the same ones for each study")
    guess, truth = (np.array([[row[n] for n in names] for row in rows], dtype=bool) for rows in (predicted, reference))
    return guess, truth


def _counts(
    guess: Bool[ndarray, "N F"], truth: Bool[ndarray, "N F"]
) -> tuple[Bool[ndarray, "N F"], Bool[ndarray, "N F"], Bool[ndarray, "N F"]]:
    """Where a finding is truly found, invented and missed."""
    return guess & truth, guess & ~truth, ~guess & truth


def _totals(guess: Bool[ndarray, "N F"], truth: Bool[ndarray, "N F"]) -> Int[ndarray, "3"]:
    return np.array([c.sum() for c in _counts(guess, truth)])


def _f1(counts: Int[ndarray, "*R 3"]) -> Float[ndarray, "*R"]:
    """2 tp / (2 tp + fp + fn) of the counts (tp, fp, fn) in the last axis."""
    tp, fp, fn = np.moveaxis(counts, -1, 0)
    whole = np.asarray(2 * tp + fp + fn)
    return np.divide(2 * tp, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def _score(tp: int, fp: int, fn: int) -> Score:
    f1 = float(_f1(np.array([tp, fp, fn])))
    return Score(_ratio(tp, tp + fp), _ratio(tp, tp + fn), f1, tp + fn)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _mean(values: Sequence[float]) -> float:
    defined = [v for v in values if not np.isnan(v)]
    return float(np.mean(defined)) if defined else float("nan")
