"""Agreement of findings, with the floor that chance reaches, in the form of HuggingFace's `evaluate`.

metric = evaluate.load("eval/metrics/coherence")
metric.compute(
    predictions=[["cardiomegaly"], []],
    references=[["cardiomegaly"], ["left effusion"]],
    findings=["cardiomegaly", "left effusion"],
)
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

# `evaluate` reads imports by line: one a line
from medim.metrics import coherence


class Coherence(evaluate.Metric):
    """`medim.metrics.coherence`: micro and macro figures, a bootstrap interval and the shuffled floor."""

    def _info(self) -> evaluate.MetricInfo:
        names = [datasets.Value("string")]
        return evaluate.MetricInfo(
            description="Precision, recall and F1 between the findings of two sides of a study.",
            citation="",
            inputs_description="predictions, references: the names of the findings that each study shows. "
            "findings: all names that there are. seed: of the bootstrap.",
            features=datasets.Features({"predictions": names, "references": names}),
        )

    def _compute(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        findings: Sequence[str],
        seed: int = 0,
    ) -> dict[str, float]:
        unknown = {name for row in (*predictions, *references) for name in row} - set(findings)
        if unknown:
            raise ValueError(f"findings {sorted(unknown)} are not among those given: {sorted(findings)}")
        predicted, reference = (
            [{name: name in row for name in findings} for row in rows] for rows in (predictions, references)
        )
        score = coherence.micro(predicted, reference)
        low, high = coherence.bootstrap_interval(predicted, reference, seed=seed)
        return {
            "precision": score.precision,
            "recall": score.recall,
            "f1": score.f1,
            "f1_low": low,
            "f1_high": high,
            "macro_f1": coherence.macro(predicted, reference).f1,
            "floor": coherence.shuffled_floor(predicted, reference),
        }
