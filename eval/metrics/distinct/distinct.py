"""Different n-grams over all n-grams of a corpus, n = 1 and 2, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/distinct")
metric.compute(predictions=["the heart is normal"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class Distinct(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["distinct"]`: in [0, 1], higher where texts vary."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Different n-grams over all n-grams of a corpus, n = 1 and 2.",
            citation="Li et al. 2016, a diversity-promoting objective function.",
            inputs_description="predictions: one report each.",
            features=datasets.Features({"predictions": string}),
        )

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return text.figures("distinct", predictions)
