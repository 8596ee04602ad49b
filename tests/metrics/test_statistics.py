"""Intervals and paired tests against closed forms and against what sampling theory promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
from sacrebleu.metrics import BLEU

from medim.metrics.statistics import Sums, holm, interval, paired, weights


def test_figures_are_those_of_their_definitions() -> None:
    assert Sums.mean([1.0, 2.0, 6.0]).value == 3.0
    assert Sums.mean([1.0, math.nan, 2.0]).value == 1.5
    assert math.isnan(Sums.mean([math.nan]).value)
    assert Sums(np.array([[1.0, 0, 1], [2, 1, 0]]), "f1").value == pytest.approx(6 / 8)


def test_bleu_of_sums_is_sacrebleus() -> None:
    made = ["the heart is not enlarged today", "clear lungs", ""]
    real = ["the heart is enlarged", "the lungs are clear", "no effusion"]
    whole = BLEU(smooth_method="none", force=True, max_ngram_order=2)
    rows = []
    for hypothesis, reference in zip(made, real, strict=True):
        one = whole.corpus_score([hypothesis], [[reference]])
        rows.append([*one.counts, *one.totals, one.sys_len, one.ref_len])
    wanted = whole.corpus_score(made, [real]).score / 100
    assert Sums(np.array(rows, dtype=float), "bleu").value == pytest.approx(wanted, abs=1e-12)
    assert Sums(np.zeros((1, 6)), "bleu").value == 0.0


def test_the_interval_of_a_mean_is_that_of_its_standard_error() -> None:
    values = np.random.default_rng(0).normal(size=400)
    low, high = interval(Sums.mean(list(values)), range(400), resamples=4000)
    error = values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)


def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    chance, covered = np.random.default_rng(1), 0
    for trial in range(300):
        low, high = interval(Sums.mean(list(chance.exponential(size=80))), range(80), seed=trial, resamples=300)
        covered += low <= 1 <= high
    assert 0.89 < covered / 300 < 0.98


def test_copies_of_a_patient_tell_nothing_new() -> None:
    values = list(np.random.default_rng(2).normal(size=50))
    once = interval(Sums.mean(values), range(50))
    copied = interval(Sums.mean(values * 4), list(range(50)) * 4)
    assert copied == pytest.approx(once, abs=1e-12)
    apart = interval(Sums.mean(values * 4), range(200))
    assert apart[1] - apart[0] < 0.6 * (once[1] - once[0])


def test_a_real_difference_is_found_and_none_is_not() -> None:
    chance = np.random.default_rng(3)
    hard = chance.normal(size=100)  # what both find hard is common to both
    first, better = hard + 0.1 * chance.normal(size=100), hard + 0.1 + 0.1 * chance.normal(size=100)
    found = paired(Sums.mean(list(first)), Sums.mean(list(better)), range(100))
    assert found.p < 0.01 and found.low < 0.1 < found.high and found.low > 0
    assert paired(Sums.mean(list(first)), Sums.mean(list(first)), range(100)).p == 1.0
    p_values = []
    for trial in range(200):
        one, two = (list(chance.normal(size=60)) for _ in range(2))
        p_values.append(paired(Sums.mean(one), Sums.mean(two), range(60), seed=trial, resamples=200).p)
    assert 0.005 < np.mean(np.array(p_values) < 0.05) < 0.11
    assert scipy.stats.kstest(p_values, "uniform").pvalue > 1e-4


def test_another_figure_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="give the same figure"):
        paired(Sums.mean([1.0]), Sums(np.ones((1, 3)), "f1"), [0])


def test_weights_draw_as_many_as_there_are() -> None:
    drawn = weights(["a", "b", "b", "c"], resamples=50)
    assert drawn.shape == (50, 3) and (drawn.sum(1) == 3).all() and drawn.std() > 0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
