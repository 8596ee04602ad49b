"""Words of all predictions over words of all references, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/length_ratio")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class LengthRatio(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["length_ratio"]`: 1 where they are as long."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Words of all predictions over words of all references.",
            citation="Ours.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("length_ratio", predictions, references)
