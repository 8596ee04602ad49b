"""Share of reports that speak of an earlier examination, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/invented_prior")
metric.compute(predictions=["the heart is normal"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class InventedPrior(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["invented_prior"]`: in [0, 1], lower is better."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Share of reports that speak of an earlier examination, though none was given.",
            citation="Ramesh et al. 2022, removing hallucinated references to non-existent priors.",
            inputs_description="predictions: one report each.",
            features=datasets.Features({"predictions": string}),
        )

    def _compute(self, predictions: Sequence[str]) -> dict[str, float]:
        return text.figures("invented_prior", predictions)
