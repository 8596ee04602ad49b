"""One self-contained HTML page of an evaluation: figures, charts, samples. Nothing is fetched when it is opened."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import jinja2

SHOWN = 8  # samples a task: the first ones, none is picked
TITLES = {"xray": "Chest X-ray phantom", "pathology": "H&E pathology tiles"}
TASKS = {
    "pair": ("Pair", "Report and image are both generated."),
    "report": ("Report", "The image is given, the report is generated."),
    "image": ("Image", "The report is given, the image is generated."),
}
# What is held against what: the words of a sample's chips.
CHIPS = {
    "pair": {"agree": "told and drawn", "missing": "told, not drawn", "invented": "drawn, not told"},
    "report": {"agree": "shown and told", "missing": "shown, not told", "invented": "told, not shown"},
    "image": {"agree": "told and drawn", "missing": "told, not drawn", "invented": "drawn, not told"},
}
TEXT_METRICS = {
    "bleu-1": "BLEU-1",
    "bleu-2": "BLEU-2",
    "bleu-3": "BLEU-3",
    "bleu-4": "BLEU-4",
    "rouge_l": "ROUGE-L",
    "findings_f1": "Findings F1",
    "distinct_1": "Distinct-1",
    "distinct_2": "Distinct-2",
    "empty": "Empty",
}


def render(results: dict[str, Any], folder: Path) -> str:
    """The page of a `results.json`; `folder` is what its image paths are relative to."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"figure": _figure, "reach": _reach}
    return environment.get_template("report.html.j2").render(
        r=results,
        samples={
            domain: {
                task: [_sample(row, folder) for row in found["rows"][:SHOWN]] for task, found in d["tasks"].items()
            }
            for domain, d in results["domains"].items()
        },
        titles=TITLES,
        tasks=TASKS,
        chips=CHIPS,
        text_metrics=TEXT_METRICS,
    )


def _sample(row: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A row with its picture as a data URI and its findings sorted into agree, missing and invented."""
    predicted, reference = (row["told"], row["seen"]) if row["task"] == "report" else (row["seen"], row["told"])
    png = base64.b64encode((folder / row["image"]).read_bytes()).decode()
    return row | {
        "picture": f"data:image/png;base64,{png}",
        "agree": [name for name in reference if name in predicted],
        "missing": [name for name in reference if name not in predicted],
        "invented": [name for name in predicted if name not in reference],
    }


def _figure(value: float | None, digits: int = 2) -> str:
    """A number for people; a dash where it is undefined."""
    return "–" if value is None else f"{value:.{digits}f}"


def _reach(found: dict[str, Any]) -> float | None:
    """How far a figure is from its floor (0) to its ceiling (1)."""
    f1, floor, ceiling = (found[key] for key in ("f1", "floor", "ceiling"))
    if f1 is None or floor is None or ceiling is None or ceiling <= floor:
        return None
    return max(0.0, (f1 - floor) / (ceiling - floor))
