"""Mean CIDEr-D by pycocoevalcap, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/cider")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class Cider(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["cider"]`: in [0, 10]."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean CIDEr-D by pycocoevalcap.",
            citation="Vedantam et al. 2015, CIDEr: consensus-based image description evaluation.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("cider", predictions, references)
