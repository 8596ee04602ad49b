"""Text metrics of generated reports, one reference each. An empty hypothesis is counted and scores zero.

`TEXT_METRICS` has all of them. Tokenisation differs by metric, as their publishers have it: BLEU splits words and
punctuation (sacrebleu's ``13a``), ROUGE-L, CIDEr and the metrics without a reference see runs of letters and digits
only; `medim.metrics.published` and METEOR 1.5 have their own. All of them lower the case first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from sacrebleu.metrics import BLEU

from medim.metrics.captions import PYCOCOEVALCAP, cider, meteor
from medim.metrics.pairs import check_pairs
from medim.metrics.priors import invented_prior
from medim.metrics.published import MAX_ORDER, NLTK, ROUGE, WORDNET, bleu_medim, meteor_nltk, rouge_l_medim
from medim.metrics.statistics import Sums

REPEATED = 4  # words of an n-gram whose repetition counts


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of the orders 1 to 4 (Papineni et al. 2002), in [0, 1], by sacrebleu without smoothing.

    Its signature is ``nrefs:1|case:lc|eff:no|tok:13a|smooth:none``. An empty hypothesis adds no match and, through the
    brevity penalty, the whole length of its reference.

    Returns:
        ``{"bleu-1": ..., "bleu-2": ..., "bleu-3": ..., "bleu-4": ...}``; zero where an order has no match at all.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    check_pairs(hypotheses, references)
    whole = BLEU(lowercase=True, smooth_method="none", force=True).corpus_score(hypotheses, [references])
    scores = {}
    for order in range(1, MAX_ORDER + 1):
        score = BLEU.compute_bleu(
            whole.counts[:order],
            whole.totals[:order],
            whole.sys_len,
            whole.ref_len,
            smooth_method="none",
            max_ngram_order=order,
        )
        scores[f"bleu-{order}"] = score.score / 100
    return scores


def bleu_sums(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """The figures of `bleu` by the counts of each pair: matches, totals, length of the output and of the reference.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    check_pairs(hypotheses, references)
    scorer = BLEU(lowercase=True, smooth_method="none", force=True)
    pairs = [scorer.corpus_score([h], [[r]]) for h, r in zip(hypotheses, references, strict=True)]
    return {
        f"bleu-{order}": Sums(
            np.array([[*one.counts[:order], *one.totals[:order], one.sys_len, one.ref_len] for one in pairs], float),
            "bleu",
        )
        for order in range(1, MAX_ORDER + 1)
    }


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F of each pair (Lin 2004: longest common subsequence, beta = 1), in [0, 1], without stemming.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    check_pairs(hypotheses, references)
    scorer = RougeScorer(["rougeL"])
    return [float(scorer.score(r, h)["rougeL"].fmeasure) for h, r in zip(hypotheses, references, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a corpus (Li et al. 2016); 0 where no text has n words."""
    grams = [gram for text in texts for gram in _grams(text, n)]
    return len(set(grams)) / max(1, len(grams))


def repetition(texts: Sequence[str]) -> Sums:
    """Mean share of 4-grams that stood in the same text before (Welleck et al. 2020: seq-rep-4); 0 for shorter texts.

    Example:
        >>> repetition(["no focal air space no focal air space", ""]).value  # 1 of 5, and 0
        0.1
    """
    grams = [_grams(text, REPEATED) for text in texts]
    return Sums.mean([1 - len(set(one)) / len(one) if one else 0.0 for one in grams])


def length_ratio(hypotheses: Sequence[str], references: Sequence[str]) -> Sums:
    """Words of all outputs over words of all references; NaN if no reference has any.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    check_pairs(hypotheses, references)
    return Sums(
        np.array([[len(_grams(text, 1)) for text in pair] for pair in zip(hypotheses, references, strict=True)], float)
    )


def empty(texts: Sequence[str]) -> Sums:
    """Share of texts with nothing but white space."""
    return Sums.mean([float(not text.strip()) for text in texts])


def _grams(text: str, n: int) -> list[tuple[str, ...]]:
    words = tokenize(text, None)
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


@dataclass(frozen=True)
class TextMetric:
    """A metric of generated reports.

    Attributes:
        name: as shown to people.
        needs_reference: without, `compute` does not look at the references.
        higher_is_better: None where neither is.
        compute: the figures of hypotheses and references by their names in results.json; a float where a figure is no
            function of sums over studies.
        source: the paper and whose implementation it is.
        extra: the line that installs what the eval extra does not; empty for nothing.
    """

    name: str
    needs_reference: bool
    higher_is_better: bool | None
    compute: Callable[[Sequence[str], Sequence[str]], dict[str, Sums | float]]
    source: str
    extra: str = ""


TEXT_METRICS: dict[str, TextMetric] = {
    "bleu": TextMetric(
        "BLEU",
        True,
        True,
        lambda made, wanted: {**bleu_sums(made, wanted)},
        "Papineni et al. 2002; sacrebleu, 13a, lower case, corpus, no smoothing",
    ),
    "bleu_medim": TextMetric(
        "BLEU (MeDiM's protocol)",
        True,
        True,
        lambda made, wanted: {**bleu_medim(made, wanted)},
        "Chen and Cherry 2014, method 1; NLTK, mean over reports",
        NLTK,
    ),
    "rouge_l": TextMetric(
        "ROUGE-L",
        True,
        True,
        lambda made, wanted: {"rouge_l": Sums.mean(rouge_l(made, wanted))},
        "Lin 2004; rouge-score, no stemming",
    ),
    "rouge_l_medim": TextMetric(
        "ROUGE-L (MeDiM's protocol)",
        True,
        True,
        lambda made, wanted: {"rouge_l_medim": rouge_l_medim(made, wanted)},
        "Lin 2004, summary level; the package rouge",
        ROUGE,
    ),
    "meteor": TextMetric(
        "METEOR 1.5",
        True,
        True,
        lambda made, wanted: {"meteor": meteor(made, wanted)},
        "Denkowski and Lavie 2014; the jar of pycocoevalcap, corpus",
        PYCOCOEVALCAP,
    ),
    "meteor_nltk": TextMetric(
        "METEOR (NLTK, MeDiM's protocol)",
        True,
        True,
        lambda made, wanted: {"meteor_nltk": meteor_nltk(made, wanted)},
        "Lavie and Agarwal 2007; NLTK, mean over reports",
        f"{NLTK} && {WORDNET}",
    ),
    "cider": TextMetric(
        "CIDEr",
        True,
        True,
        lambda made, wanted: {"cider": cider(made, wanted)},
        "Vedantam et al. 2015, CIDEr-D; pycocoevalcap, of 10",
        PYCOCOEVALCAP,
    ),
    "distinct": TextMetric(
        "Distinct-n",
        False,
        True,
        lambda made, _: {f"distinct_{n}": distinct(made, n) for n in (1, 2)},
        "Li et al. 2016; ours, corpus",
    ),
    "repetition": TextMetric(
        "Repetition",
        False,
        False,
        lambda made, _: {"repetition": repetition(made)},
        "Welleck et al. 2020, seq-rep-4; ours",
    ),
    "length_ratio": TextMetric(
        "Length ratio",
        True,
        None,
        lambda made, wanted: {"length_ratio": length_ratio(made, wanted)},
        "words made over words of the references; ours",
    ),
    "invented_prior": TextMetric(
        "Invented prior",
        False,
        False,
        lambda made, _: {"invented_prior": invented_prior(made)},
        "Ramesh et al. 2022 name the error; our phrases",
    ),
    "empty": TextMetric(
        "Empty", False, False, lambda made, _: {"empty": empty(made)}, "share of outputs without a word; ours"
    ),
}


def figures(name: str, hypotheses: Sequence[str], references: Sequence[str] = ()) -> dict[str, float]:
    """The figures of one metric of `TEXT_METRICS` as numbers.

    Example:
        >>> figures("repetition", ["clear lungs"])
        {'repetition': 0.0}
    """
    found = TEXT_METRICS[name].compute(hypotheses, references)
    return {figure: sums.value if isinstance(sums, Sums) else sums for figure, sums in found.items()}
