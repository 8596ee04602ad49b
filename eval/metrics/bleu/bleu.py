"""Corpus BLEU-1 to BLEU-4 by sacrebleu, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/bleu")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class Bleu(evaluate.Metric):
    """`medim.metrics.text.bleu`: figures in [0, 1], an empty prediction counts as zero."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Corpus BLEU of the orders 1 to 4: sacrebleu, tokenizer 13a, lower case, no smoothing.",
            citation="Papineni et al. 2002, BLEU: a method for automatic evaluation of machine translation.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.bleu(predictions, references)
