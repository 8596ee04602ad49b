"""Agreement of findings against figures worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from medim.metrics import coherence
from medim.metrics.coherence import Score

NAMES = ("a", "b", "c")


def rows(*present: str) -> list[dict[str, bool]]:
    """One study a string: the letters in it are its findings."""
    return [{name: name in study for name in NAMES} for study in present]


# a: found, found, invented; b: missed, found, -; c: never
PREDICTED, REFERENCE = rows("a", "ab", "a"), rows("ab", "ab", "")


def test_micro():
    assert coherence.micro(PREDICTED, REFERENCE) == Score(3 / 4, 3 / 4, 6 / 8, support=4)


def test_per_finding():
    scores = coherence.per_finding(PREDICTED, REFERENCE)
    assert list(scores) == list(NAMES)
    assert scores["a"] == Score(2 / 3, 1.0, 4 / 5, support=2)
    assert scores["b"] == Score(1.0, 1 / 2, 2 / 3, support=2)
    assert scores["c"].support == 0
    assert all(math.isnan(v) for v in (scores["c"].precision, scores["c"].recall, scores["c"].f1))


def test_what_is_invented_only_scores_zero():
    scores = coherence.per_finding(rows("c"), rows(""))
    assert scores["c"].f1 == 0 and scores["c"].precision == 0 and math.isnan(scores["c"].recall)


def test_macro_leaves_undefined_findings_out():
    score = coherence.macro(PREDICTED, REFERENCE)
    assert score.f1 == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert score.precision == pytest.approx((2 / 3 + 1) / 2)
    assert score.support == 4


def test_floor_is_the_mean_over_cyclic_shifts():
    # perfect pairs of a, b and ab. Shifted by one: (ab, a) (a, b) (b, ab) -> tp 2, fp 2, fn 2; by two: the same
    studies = rows("a", "b", "ab")
    assert coherence.micro(studies, studies).f1 == 1.0
    assert coherence.shuffled_floor(studies, studies) == pytest.approx(4 / 8)


def test_floor_never_pairs_a_study_with_itself():
    studies = rows("a", "b", "c")
    assert coherence.shuffled_floor(studies, studies) == 0.0
    assert math.isnan(coherence.shuffled_floor(studies[:1], studies[:1]))


def test_floor_equals_the_score_where_all_studies_are_the_same():
    assert coherence.shuffled_floor(rows("a", "a"), rows("ab", "ab")) == pytest.approx(2 / 3)


def test_interval_holds_the_score_and_depends_on_the_seed_only():
    predicted, reference = PREDICTED * 10, REFERENCE * 10
    low, high = coherence.bootstrap_interval(predicted, reference, seed=3)
    assert 0.6 < low < 0.75 < high < 0.9
    assert coherence.bootstrap_interval(predicted, reference, seed=3) == (low, high)
    assert coherence.bootstrap_interval(predicted, reference, seed=4) != (low, high)
    wide = coherence.bootstrap_interval(PREDICTED, REFERENCE, seed=3)
    assert wide[1] - wide[0] > high - low


def test_interval_of_a_perfect_score_is_a_point():
    assert coherence.bootstrap_interval(REFERENCE, REFERENCE) == (1.0, 1.0)


def test_nothing_anywhere_is_undefined():
    assert math.isnan(coherence.micro(rows(""), rows("")).f1)
    assert all(math.isnan(v) for v in coherence.bootstrap_interval(rows("", ""), rows("", "")))


@pytest.mark.parametrize(
    ("predicted", "reference", "message"),
    [([], [], "give as many"), (rows("a"), rows("a", "b"), "give as many"), ([{"z": True}], rows("a"), "differ")],
)
def test_studies_must_match(predicted, reference, message):
    with pytest.raises(ValueError, match=message):
        coherence.micro(predicted, reference)


def test_a_gap_of_prevalence_is_the_mean_difference_and_chance_has_one_too():
    made, data = rows("ab", "a", "", "b"), rows("a", "a", "ac", "")
    ours, real = coherence.prevalence(made), coherence.prevalence(data)
    assert ours["a"] == 0.5 and real["a"] == 0.75 and real["b"] == 0
    assert coherence.prevalence_gap(made, data) == pytest.approx(np.mean([abs(ours[n] - real[n]) for n in real]))
    assert coherence.prevalence_gap(data, data) == 0
    rng, p = np.random.default_rng(0), np.array([0.1, 0.3, 0.5])
    some = [{name: bool(yes) for name, yes in zip("abc", row, strict=True)} for row in rng.random((400, 3)) < p]
    drawn = rng.binomial(100, np.array(list(coherence.prevalence(some).values())), (4000, 3)) / 100
    other = rng.binomial(400, np.array(list(coherence.prevalence(some).values())), (4000, 3)) / 400
    assert coherence.chance_gap(some, 100) == pytest.approx(float(np.abs(drawn - other).mean()), rel=0.03)


def sided(*studies: str) -> list[dict[str, bool]]:
    """One study a string of words: r and l are effusions of the right and the left side, h is a large heart."""
    names = {"r": "right effusion", "l": "left effusion", "h": "large heart"}
    return [{name: letter in study for letter, name in names.items()} for study in studies]


def test_without_sides_a_finding_is_there_if_it_is_on_either():
    assert coherence.sideless(sided("r", "l", "rl", "h")) == [
        {"effusion": there, "large heart": heart} for there, heart in ((True, False),) * 3 + ((False, True),)
    ]


def test_side_accuracy_is_over_findings_that_both_have_on_one_side():
    predicted, reference = sided("r", "l", "r", "rl", "r", "h", "r"), sided("r", "r", "l", "r", "", "h", "rh")
    found = coherence.side_accuracy(predicted, reference)
    assert found.rows.tolist() == [[1, 1], [0, 1], [0, 1], [0, 0], [0, 0], [0, 0], [1, 1]]
    assert found.value == 0.5
    assert math.isnan(coherence.side_accuracy(sided("h"), sided("h")).value)
