"""Mean sentence BLEU-1 to BLEU-4 as the MeDiM paper's script has it, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/bleu_medim")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class BleuMedim(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["bleu_medim"]`: figures in [0, 1], an empty prediction counts as zero."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean sentence BLEU-1 to BLEU-4 as the MeDiM paper's script has it (NLTK, method 1).",
            citation="Chen and Cherry 2014, smoothing techniques for sentence-level BLEU.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("bleu_medim", predictions, references)
