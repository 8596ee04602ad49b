"""Mean share of 4-grams that stood in the same text before, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/repetition")
metric.compute(predictions=["the heart is normal"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class Repetition(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["repetition"]`: in [0, 1], 0 where none is repeated."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean share of 4-grams that stood in the same text before.",
            citation="Welleck et al. 2020, neural text generation with unlikelihood training.",
            inputs_description="predictions: one report each.",
            features=datasets.Features({"predictions": string}),
        )

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return text.figures("repetition", predictions)
