"""METEOR 1.5 and CIDEr as image captioning has them, by the package pycocoevalcap."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rouge_score.tokenize import tokenize

from medim.errors import UserError
from medim.metrics.pairs import check_pairs, optional
from medim.metrics.statistics import Sums

PYCOCOEVALCAP = "pip install --no-deps pycocoevalcap==1.2"
JAVA = "a Java runtime, such as Debian's default-jre-headless"

# Tuned for ranking in English (Denkowski and Lavie 2014, table 1)
STAGES = np.array([1.0, 0.6, 0.8, 0.6])  # a match of words, stems, synonyms, paraphrases
CONTENT = 0.75  # a content word; a function word has the rest


def meteor(hypotheses: Sequence[str], references: Sequence[str]) -> Sums:
    """METEOR 1.5 of the corpus (Denkowski and Lavie 2014), in [0, 1]; the jar lowers the case and splits punctuation.

    The jar aligns the words of each pair and counts; the figure is a function of the summed counts, the same as the
    jar's own for the corpus, not the mean over pairs.

    Raises:
        ValueError: no pairs, or lists of different lengths.
        UserError: pycocoevalcap or Java is not installed, or the jar fails.
    """
    check_pairs(hypotheses, references)
    module = optional("pycocoevalcap.meteor.meteor", PYCOCOEVALCAP)
    lines = [
        f"SCORE ||| {_plain(reference)} ||| {_plain(hypothesis)}\n"
        for hypothesis, reference in zip(hypotheses, references, strict=True)
    ]
    command = ["java", "-Dfile.encoding=UTF-8", "-Xmx2G", "-jar", module.METEOR_JAR]
    options = ["-", "-", "-stdio", "-l", "en", "-norm"]
    try:
        done = subprocess.run(
            [*command, *options],
            cwd=Path(module.__file__).parent,
            input="".join(lines).encode(),
            capture_output=True,
            check=True,
        )
        counts = np.array([[float(one) for one in line.split()] for line in done.stdout.decode().splitlines()])
    except FileNotFoundError as error:
        raise UserError(f"METEOR 1.5 needs {JAVA}: the command java is not found") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"METEOR 1.5: java ended with {error.returncode}: {error.stderr.decode().strip()}") from error
    if counts.shape != (len(lines), 23):
        raise UserError(f"METEOR 1.5 answered {counts.shape} for {len(lines)} pairs: is pycocoevalcap whole?")
    return Sums(_meteor_rows(counts), "meteor")


def cider(hypotheses: Sequence[str], references: Sequence[str]) -> Sums:
    """Mean CIDEr, in [0, 10] (Vedantam et al. 2015; of its variants the one of pycocoevalcap, CIDEr-D without stems).

    Words are runs of letters and digits, in lower case. N-grams weigh the less, the more references of the corpus have
    them: a corpus of one pair scores zero, and so does each pair in whose reference there is no rarer n-gram. A
    resample of the bootstrap keeps the weights of the whole corpus.

    Raises:
        ValueError: no pairs, or lists of different lengths.
        UserError: pycocoevalcap is not installed.
    """
    check_pairs(hypotheses, references)
    module = optional("pycocoevalcap.cider.cider", PYCOCOEVALCAP)
    made, wanted = (
        {index: [" ".join(tokenize(text, None))] for index, text in enumerate(texts)}
        for texts in (hypotheses, references)
    )
    if not any(text for (text,) in wanted.values()):
        return Sums.mean([0.0] * len(hypotheses))
    _, scores = module.Cider().compute_score(wanted, made)
    return Sums.mean([float(score) for score in scores])


def _plain(text: str) -> str:
    """On one line and without the jar's separator."""
    return " ".join(text.replace("|||", " ").split())


def _meteor_rows(counts: np.ndarray) -> np.ndarray:
    """What a pair adds: weighted matches and lengths of either side, chunks, matched words.

    The jar's numbers: words made and wanted, function words among them; for each stage the matched content words made
    and wanted and the function words likewise; chunks; matched words made and wanted.
    """
    lengths, functions, chunks, matched = counts[:, :2], counts[:, 2:4], counts[:, 20], counts[:, 21:]
    stages = counts[:, 4:20].reshape(-1, 4, 2, 2)  # pair, stage, content or function, made or wanted
    kinds = np.array([CONTENT, 1 - CONTENT])
    matches = np.einsum("nskm,s,k->nm", stages, STAGES, kinds)
    weighted = CONTENT * (lengths - functions) + (1 - CONTENT) * functions
    # A pair that is the same on both sides is not fragmented: the jar leaves its one chunk out
    broken = ~((matched == lengths).all(1) & (chunks == 1))
    return np.column_stack([matches, weighted, chunks * broken, matched.mean(1) * broken])
