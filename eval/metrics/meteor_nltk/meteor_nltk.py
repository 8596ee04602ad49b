"""Mean METEOR of NLTK, as the MeDiM paper has it, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/meteor_nltk")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class MeteorNltk(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["meteor_nltk"]`: in [0, 1], other figures than METEOR 1.5's; needs WordNet."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean METEOR of NLTK, as the MeDiM paper has it.",
            citation="Lavie and Agarwal 2007, METEOR.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("meteor_nltk", predictions, references)
