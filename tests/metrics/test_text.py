"""BLEU, ROUGE-L and distinct-n against figures worked out by hand."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from sacrebleu.metrics import BLEU

from medim.data import phantom
from medim.data.studies import Study
from medim.errors import UserError
from medim.metrics import text
from medim.metrics.statistics import Sums


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


# ------------------------------------------------------------------- against the packages that others compute them with


@pytest.fixture(scope="module")
def pairs() -> tuple[list[str], list[str]]:
    """200 reports beside others: of Open-i where torchxrayvision is installed, else of the embedded X-rays."""
    try:
        reports = [study.report for study in itertools.islice(open_i_studies(), 400)]
    except UserError:
        reports = [phantom.study(0, i).report + " " + phantom.study(0, i + 1).report for i in range(400)]
    made = [f"{a} {b.split('.')[0]}." for a, b in zip(reports[:200], reports[200:], strict=True)]
    made[17], made[63] = "", "  "
    return made, [reports[(i + i % 3) % 200] for i in range(200)]


def open_i_studies() -> Iterator[Study]:
    from medim.data.sources import SOURCES

    source = SOURCES["open-i"]
    for one in source.read(Path(), source.options()):
        study = one() if callable(one) else one
        if isinstance(study, Study) and study.report.strip():
            yield study


def test_bleu_is_sacrebleus(pairs: tuple[list[str], list[str]]) -> None:
    made, wanted = pairs
    for order in range(1, 5):
        theirs = BLEU(lowercase=True, smooth_method="none", max_ngram_order=order, force=True)
        score = theirs.corpus_score(made, [wanted]).score / 100
        assert text.figures("bleu", made, wanted)[f"bleu-{order}"] == pytest.approx(score, abs=1e-9)
        assert text.bleu(made, wanted)[f"bleu-{order}"] == pytest.approx(score, abs=1e-9)


def test_rouge_l_is_rouge_scores(pairs: tuple[list[str], list[str]]) -> None:
    scorer = RougeScorer(["rougeL"])
    theirs = np.mean([scorer.score(wanted, made)["rougeL"].fmeasure for made, wanted in zip(*pairs, strict=True)])
    assert text.figures("rouge_l", *pairs)["rouge_l"] == pytest.approx(theirs, abs=1e-9)


def test_bleu_medim_is_nltks(pairs: tuple[list[str], list[str]]) -> None:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smooth, scores = SmoothingFunction().method1, []
    for made, wanted in zip(*pairs, strict=True):
        a, b = (one.lower().replace(".", " .").split() for one in (made, wanted))
        scores.append(sentence_bleu([b], a, (0.25,) * 4, smooth) if a else 0.0)
    assert text.figures("bleu_medim", *pairs)["bleu_medim-4"] == pytest.approx(np.mean(scores), abs=1e-9)


def test_rouge_l_medim_is_the_package_rouge(pairs: tuple[list[str], list[str]]) -> None:
    rouge = pytest.importorskip("rouge").Rouge()
    both = [(a.lower(), b.lower()) for a, b in zip(*pairs, strict=True) if a.strip()]
    scores = [rouge.get_scores(a, b)[0]["rouge-l"]["f"] for a, b in both]
    assert text.figures("rouge_l_medim", *pairs)["rouge_l_medim"] == pytest.approx(sum(scores) / 200, abs=1e-9)


def test_cider_and_meteor_are_pycocoevalcaps(pairs: tuple[list[str], list[str]]) -> None:
    cider = pytest.importorskip("pycocoevalcap.cider.cider")
    words = [{i: [" ".join(tokenize(one, None))] for i, one in enumerate(some)} for some in pairs]
    score, _ = cider.Cider().compute_score(words[1], words[0])
    assert text.figures("cider", *pairs)["cider"] == pytest.approx(float(score), abs=1e-9)
    if shutil.which("java") is None:
        pytest.skip("METEOR needs Java")
    from pycocoevalcap.meteor.meteor import Meteor

    made, wanted = ({i: [" ".join(one.split())] for i, one in enumerate(some)} for some in pairs)
    theirs = Meteor()
    score, each = theirs.compute_score(wanted, made)
    theirs.meteor_p.kill()
    theirs.meteor_p.wait()
    for stream in (theirs.meteor_p.stdin, theirs.meteor_p.stdout, theirs.meteor_p.stderr):
        stream.close()
    assert text.figures("meteor", *pairs)["meteor"] == pytest.approx(score, abs=1e-6)
    assert score != pytest.approx(np.mean(each), abs=1e-3)  # the corpus figure is no mean


SLOW = pytest.mark.slow  # METEOR's jar takes seconds a call


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if n == "meteor" else ()) for n in text.TEXT_METRICS])
def test_order_does_not_matter_and_rows_make_the_figure(name: str, pairs: tuple[list[str], list[str]]) -> None:
    metric = text.TEXT_METRICS[name]
    try:
        found = text.figures(name, *pairs)
    except UserError as error:
        pytest.skip(str(error))
    turned = text.figures(name, *(some[::-1] for some in pairs))
    assert turned == pytest.approx(found, abs=1e-9)
    for figure, sums in metric.compute(*pairs).items():
        if isinstance(sums, Sums):
            assert len(sums.rows) == 200 and sums.value == found[figure]
    if metric.needs_reference and name not in ("cider", "length_ratio"):
        kept = [one for one in pairs[1] if one.strip()]
        assert text.figures(name, kept, kept) == pytest.approx(dict.fromkeys(found, 1.0), abs=0.03)
        assert text.figures(name, [""] * 3, kept[:3]) == dict.fromkeys(found, 0.0)


PRIORS = {
    True: (
        "The heart is unchanged.",
        "Compared to the prior radiograph, the effusion is larger.",
        "Interval development of a left effusion.",
        "Again seen is cardiomegaly.",
        "Stable cardiomegaly.",
        "There is a new opacity at the right base.",
        "The pneumothorax has resolved.",
        "Effusion is no longer seen.",
        "No change since the previous examination.",
        "Worsening edema.",
        "The tube remains in place.",
    ),
    False: (
        "The heart is enlarged.",
        "No pleural effusion or pneumothorax.",
        "Prior granulomatous disease.",
        "Status post prior sternotomy.",
        "Comparison: None.",
        "No prior studies for comparison.",
        "Increased density at the left base.",
        "Recommend follow-up radiograph.",
        "Opacity on the right compared to the left.",
        "",
    ),
}


@pytest.mark.parametrize(("wanted", "sentence"), [(yes, one) for yes, some in PRIORS.items() for one in some])
def test_an_invented_prior(wanted: bool, sentence: str) -> None:
    assert text.figures("invented_prior", [sentence])["invented_prior"] == float(wanted)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in (("cider", "pycocoevalcap.cider.cider"), ("rouge_l_medim", "rouge")):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(UserError, match="pip install"):
            text.figures(name, ["a"], ["a"])
