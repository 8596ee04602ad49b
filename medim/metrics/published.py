"""The figures of the MeDiM paper, as its published script makes them: sentence BLEU, ROUGE-L and METEOR.

The script lowers the case, makes each full stop a word and splits the rest at white space. It leaves out studies whose
output is empty; here they are counted and score zero.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from medim.errors import UserError
from medim.metrics.pairs import check_pairs, optional
from medim.metrics.statistics import Sums

MAX_ORDER = 4
NLTK = "pip install nltk"
ROUGE = "pip install rouge==1.0.1"
WORDNET = "python -m nltk.downloader wordnet"


def words(text: str) -> list[str]:
    """A text as the script splits it.

    Example:
        >>> words("No effusion, no edema.")
        ['no', 'effusion,', 'no', 'edema', '.']
    """
    return text.lower().replace(".", " .").split()


def bleu_medim(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Mean of NLTK's sentence BLEU with smoothing method 1 (Chen and Cherry 2014), orders 1 to 4, each in [0, 1].

    Raises:
        ValueError: no pairs, or lists of different lengths.
        UserError: NLTK is not installed.
    """
    check_pairs(hypotheses, references)
    nltk = optional("nltk.translate.bleu_score", NLTK)
    smooth = nltk.SmoothingFunction().method1
    weights = [(1 / order,) * order for order in range(1, MAX_ORDER + 1)]
    rows = [
        nltk.sentence_bleu([words(reference)], words(hypothesis), weights, smooth)
        if hypothesis.strip()
        else [0.0] * MAX_ORDER
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    return {
        f"bleu_medim-{order}": Sums.mean([float(row[order - 1]) for row in rows]) for order in range(1, MAX_ORDER + 1)
    }


def rouge_l_medim(hypotheses: Sequence[str], references: Sequence[str]) -> Sums:
    """Mean ROUGE-L F by the package `rouge`: each sentence of the reference against all of the output (Lin 2004).

    It counts a word once a text, however often it stands there, so that its figures differ from rouge-score's. A text
    without a word between its full stops counts as empty.

    Raises:
        ValueError: no pairs, or lists of different lengths.
        UserError: rouge is not installed.
    """
    check_pairs(hypotheses, references)
    rouge = optional("rouge", ROUGE).Rouge(metrics=["rouge-l"], stats=["f"])
    scores = []
    for hypothesis, reference in zip(hypotheses, references, strict=True):
        if not all(text.replace(".", " ").strip() for text in (hypothesis, reference)):
            scores.append(0.0)
            continue
        with _deep(len(hypothesis) + len(reference)):
            scores.append(float(rouge.get_scores(hypothesis.lower(), reference.lower())[0]["rouge-l"]["f"]))
    return Sums.mean(scores)


def meteor_nltk(hypotheses: Sequence[str], references: Sequence[str]) -> Sums:
    """Mean of NLTK's METEOR of each pair (Lavie and Agarwal 2007): words, Porter stems, WordNet's synonyms.

    It has other weights and no paraphrases: its figures are not those of METEOR 1.5.

    Raises:
        ValueError: no pairs, or lists of different lengths.
        UserError: NLTK is not installed, or WordNet is not among its data.
    """
    check_pairs(hypotheses, references)
    score = optional("nltk.translate.meteor_score", NLTK).single_meteor_score
    pairs = zip(hypotheses, references, strict=True)
    try:
        return Sums.mean([float(score(words(reference), words(hypothesis))) for hypothesis, reference in pairs])
    except LookupError as error:
        raise UserError(
            f"NLTK has no WordNet data: {WORDNET}; without a network, put the files of WordNet 3.0 into "
            "corpora/wordnet of a folder that NLTK_DATA names"
        ) from error


@contextmanager
def _deep(calls: int) -> Iterator[None]:
    """Room for the recursion of `rouge`, which goes one call deep for each word of a pair of sentences."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(limit + calls)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)
