"""F1 of the findings that rules read in two lists of reports, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/rule_f1")
metric.compute(predictions=["small pleural effusion"], references=["moderate left pleural effusion"])
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import findings


class RuleF1(evaluate.Metric):
    """`medim.metrics.findings.rule_f1`: figures in [0, 1]; neither CheXbert F1 nor CheXpert F1."""

    def _info(self) -> evaluate.MetricInfo:
        string = datasets.Value("string")
        return evaluate.MetricInfo(
            description="Micro-F1 over 49 findings, over five of them, and the mean F1 of a report; findings by rules.",
            citation="Phrases: Delbrouck, radlabels 0.2.0 (arXiv 2607.06597). Rules: ours, after Chapman et al. 2001.",
            inputs_description="predictions, references: one chest X-ray report each. "
            "doubt: whether an uncertain finding counts as positive.",
            features=datasets.Features({"predictions": string, "references": string}),
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str], doubt: bool = True) -> dict[str, float]:
        return {name: sums.value for name, sums in findings.rule_f1(predictions, references, doubt=doubt).items()}
