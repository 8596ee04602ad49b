"""Mean ROUGE-L F by rouge-score, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/rouge_l")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class RougeL(evaluate.Metric):
    """`medim.metrics.text.rouge_l`, its mean: in [0, 1], an empty prediction counts as zero."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean F measure of the longest common subsequence: rouge-score, lower case, no stemming.",
            citation="Lin 2004, ROUGE: a package for automatic evaluation of summaries.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return {"rouge_l": statistics.fmean(text.rouge_l(predictions, references))}
