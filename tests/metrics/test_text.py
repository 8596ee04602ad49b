"""BLEU, ROUGE-L and distinct-n against figures worked out by hand."""

from __future__ import annotations

import math

import pytest

from medim.metrics import text


def test_bleu_of_a_shorter_hypothesis_has_a_brevity_penalty():
    # 4 of 4 words, 3 of 3 pairs, 2 of 2 triples, 1 of 1 quadruple; 4 words against 6
    scores = text.bleu(["The heart is normal"], ["the heart is normal in size"])
    assert scores == pytest.approx({f"bleu-{n}": math.exp(1 - 6 / 4) for n in range(1, 5)})


def test_bleu_counts_over_the_corpus():
    # words: 3 of 4 and 2 of 3 (punctuation is a word); pairs: 1 of 3 ("no effusion") and 1 of 2 ("clear .")
    scores = text.bleu(["no effusion left .", "lungs clear ."], ["no effusion seen .", "lung clear ."])
    assert scores["bleu-1"] == pytest.approx(5 / 7)
    assert scores["bleu-2"] == pytest.approx(math.sqrt(5 / 7 * 2 / 5))
    assert scores["bleu-3"] == 0.0


def test_bleu_splits_punctuation():
    assert text.bleu(["Clear."], ["clear ."])["bleu-2"] == pytest.approx(1.0)


def test_bleu_clips_repeated_words():
    # "clear" stands once in the reference: 1 of 4
    assert text.bleu(["clear clear clear clear"], ["lungs are clear now"])["bleu-1"] == pytest.approx(1 / 4)


def test_an_empty_hypothesis_is_counted():
    reference = "the heart is normal in size"
    both = text.bleu([reference, ""], [reference, reference])
    assert both["bleu-1"] == pytest.approx(math.exp(1 - 12 / 6))
    assert text.bleu([""], [reference]) == {f"bleu-{n}": 0.0 for n in range(1, 5)}
    assert text.rouge_l([reference, ""], [reference, reference]) == [1.0, 0.0]


def test_rouge_l_is_the_longest_common_subsequence():
    # "heart normal": 2 words of 3 and of 4
    (score,) = text.rouge_l(["Heart size normal."], ["the heart is normal"])
    assert score == pytest.approx(2 * (2 / 3) * (2 / 4) / (2 / 3 + 2 / 4))


def test_rouge_l_does_not_stem():
    assert text.rouge_l(["effusions"], ["effusion"]) == [0.0]


@pytest.mark.parametrize(("n", "expected"), [(1, 2 / 5), (2, 2 / 3), (4, 0.0)])
def test_distinct(n: int, expected: float):
    # words: no effusion no | no effusion; pairs: (no effusion) twice, (effusion no)
    assert text.distinct(["No effusion, no.", "no effusion"], n) == pytest.approx(expected)


@pytest.mark.parametrize("metric", [text.bleu, text.rouge_l])
@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], ["a", "b"])])
def test_pairs_are_needed(metric, hypotheses, references):
    with pytest.raises(ValueError, match="give as many"):
        metric(hypotheses, references)
