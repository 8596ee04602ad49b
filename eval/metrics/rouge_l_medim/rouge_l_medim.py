"""Mean ROUGE-L F by the package rouge, as the MeDiM paper has it, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/rouge_l_medim")
metric.compute(predictions=["the heart is normal"], references=["normal heart size"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import text


class RougeLMedim(evaluate.Metric):
    """`medim.metrics.text.TEXT_METRICS["rouge_l_medim"]`: in [0, 1], an empty prediction counts as zero."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Mean ROUGE-L F by the package rouge, as the MeDiM paper has it.",
            citation="Lin 2004, ROUGE: a package for automatic evaluation of summaries.",
            inputs_description="predictions, references: one report each.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
        return text.figures("rouge_l_medim", predictions, references)
