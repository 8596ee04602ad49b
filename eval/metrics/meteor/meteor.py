"""METEOR 1.5 of the corpus, by the jar of pycocoevalcap, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/meteor")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class Meteor(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["meteor"]`: in [0, 1]; needs Java."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="METEOR 1.5 of the corpus, by the jar of pycocoevalcap.",
            citation="Denkowski and Lavie 2014, Meteor universal.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("meteor", predictions, references)
