"""Text metrics of generated reports, one reference each. An empty hypothesis is counted and scores zero.

Tokenisation differs by metric, as their publishers have it: BLEU splits words and punctuation (sacrebleu's ``13a``),
ROUGE-L and distinct-n see runs of letters and digits only. All of them lower the case first.
"""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenize import tokenize
from sacrebleu.metrics import BLEU

MAX_ORDER = 4


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Corpus BLEU of the orders 1 to 4 (Papineni et al. 2002), in [0, 1], by sacrebleu without smoothing.

    Its signature is ``nrefs:1|case:lc|eff:no|tok:13a|smooth:none``. An empty hypothesis adds no match and, through the
    brevity penalty, the whole length of its reference.

    Returns:
        ``{"bleu-1": ..., "bleu-2": ..., "bleu-3": ..., "bleu-4": ...}``; zero where an order has no match at all.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    _check(hypotheses, references)
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


def rouge_l(hypotheses: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L F of each pair (Lin 2004: longest common subsequence, beta = 1), in [0, 1], without stemming.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    _check(hypotheses, references)
    scorer = RougeScorer(["rougeL"])
    return [float(scorer.score(r, h)["rougeL"].fmeasure) for h, r in zip(hypotheses, references, strict=True)]


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of a corpus (Li et al. 2016); 0 where no text has n words."""
    words = [tokenize(text, None) for text in texts]
    grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
    return len(set(grams)) / max(1, len(grams))


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: give as many, one at least")
