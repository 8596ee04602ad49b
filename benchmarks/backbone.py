"""What pretraining is worth: bits of held-out reports by the likelihood bound, and curves of the runs as a picture.

    python -m benchmarks.backbone pretrained=runs/smollm2 scratch=runs/smollm2-scratch causal=runs/smollm2-causal \\
        --causal causal --data data/open-i-findings --svg docs/backbone.svg
    python -m benchmarks.backbone demo=runs/smollm2 --data data/open-i-findings --studies 4 --n-times 2    # small

Each NAME=DIR is the folder of a training run (its `final` model and its validation.jsonl). The bound is of the report
alone, one noise level for all of its slot (`medim.diffusion.nelbo_tokens`), the same masks for every model; all bits of
a slot, its end and filling included, are divided by the report's tokens and its end, or by its letters.
Prints a table, then one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.causal import causal_attention
from benchmarks.report import finish, table
from medim import MeDiM
from medim.canvas import Canvas, Segment, layout
from medim.cli.common import pick_device, quiet
from medim.data.prepare import load
from medim.diffusion import nelbo_tokens
from medim.errors import UserError
from medim.model.medim import MeDiMModel

HUES = ("#0b6e99", "#c2410c", "#4d7c0f", "#7e22ce", "#be123c", "#525252")


def report_bits(model: MeDiM, reports: Sequence[str], n_times: int, batch_size: int) -> np.ndarray:
    """Bits of each report [R], all of its slot."""
    bits = []
    for first in tqdm(range(0, len(reports), batch_size), desc=model.name, unit="batch"):
        part = reports[first : first + batch_size]
        rows = [
            layout([Segment("report", "text", model.joint.report_ids(text))], model.joint.vocabulary) for text in part
        ]
        canvas = Canvas.collate(rows, model.joint.vocabulary.eos).to(model.model.device)
        scored = canvas.has_role("report")
        with torch.no_grad():
            terms = nelbo_tokens(
                model.model.denoiser(canvas, scored),
                canvas.ids,
                scored,
                mask_id=model.joint.vocabulary.mask,
                n_times=n_times,
                generator=[torch.Generator().manual_seed(first + i) for i in range(len(part))],
                schedule=model.model.schedule,
            )
        bits.append(terms.mean(0).sum(1).cpu().numpy() / math.log(2))
    return np.concatenate(bits)


def curves(runs: Mapping[str, Path], key: str = "pair/text/text") -> dict[str, list[tuple[int, float]]]:
    """Validation of each run by step."""
    found = {}
    for name, run in runs.items():
        lines = [json.loads(line) for line in (run / "validation.jsonl").read_text().splitlines()]
        found[name] = [(line["step"], line[key]) for line in lines if key in line]
    return found


def interval(bits: np.ndarray, tokens: np.ndarray) -> list[float]:
    """95% bootstrap interval of bits a token, whole reports drawn."""
    drawn = np.random.default_rng(0).integers(0, len(bits), (2000, len(bits)))
    found = np.quantile(bits[drawn].sum(1) / tokens[drawn].sum(1), [0.025, 0.975])
    return [round(float(one), 3) for one in found]


def as_svg(lines: Mapping[str, Sequence[tuple[int, float]]], title: str) -> str:
    """Curves as a picture of 640 x 360."""
    steps, values = ([point[i] for line in lines.values() for point in line] for i in (0, 1))
    low, high, last = math.floor(2 * min(values)) / 2, math.ceil(2 * max(values)) / 2, max(steps)

    def x(step: float) -> float:
        return 60 + 430 * step / last

    def y(value: float) -> float:
        return 310 - 260 * (value - low) / (high - low)

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 360" font-family="sans-serif" font-size="12">',
        '<rect width="640" height="360" fill="white"/>',
        f'<text x="60" y="26" font-size="14">{title}</text>',
    ]
    for value in np.arange(low, high + 0.01, 0.5):
        parts.append(f'<line x1="60" x2="490" y1="{y(value):.1f}" y2="{y(value):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="52" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for step in sorted(set(steps)):
        parts.append(f'<text x="{x(step):.1f}" y="328" text-anchor="middle">{step}</text>')
    parts.append('<text x="275" y="348" text-anchor="middle">steps</text>')
    places, free = {}, -math.inf
    for name in sorted(lines, key=lambda name: -lines[name][-1][1]):  # labels from the top, not one on another
        places[name] = free = max(y(lines[name][-1][1]) + 4, free + 15)
    for (name, line), hue in zip(lines.items(), HUES, strict=False):
        dots = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(f'<polyline points="{dots}" fill="none" stroke="{hue}" stroke-width="2"/>')
        parts.append(
            f'<text x="{x(line[-1][0]) + 8:.1f}" y="{places[name]:.1f}" fill="{hue}">{name} {line[-1][1]:.2f}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="NAME=DIR", help="folders of runs")
    parser.add_argument("--data", required=True, help="a prepared dataset with reports")
    parser.add_argument("--split", default="test")
    parser.add_argument("--studies", type=int, default=64, help="reports that are scored")
    parser.add_argument("--n-times", type=int, default=8, help="noise levels a report")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--causal", action="append", default=[], metavar="NAME", help="a run of benchmarks.causal")
    parser.add_argument("--svg", type=Path, help="where the curves go")
    parser.add_argument("--device")
    args = parser.parse_args(argv)
    quiet()
    runs = {name: Path(folder) for name, _, folder in (one.partition("=") for one in args.runs)}
    for name, run in runs.items():
        if not (run / "final").is_dir():
            raise UserError(f"{name}={run}: no finished run there")
    data = load(args.data, split=args.split)
    reports = [record["report"] for record in data.select(range(min(args.studies, len(data)))) if record["report"]]
    device, free = pick_device(args.device), MeDiMModel.attention
    figures: dict[str, Any] = {}
    for name, run in runs.items():
        MeDiMModel.attention = causal_attention if name in args.causal else free  # type: ignore[method-assign, assignment]
        model = MeDiM.from_pretrained(run / "final", device)
        most = model.joint.slot.longest - 1
        tokens = np.array([min(len(model.joint.text.encode(text)), most) + 1 for text in reports])
        letters = np.array([len(text) for text in reports])
        bits = report_bits(model, reports, args.n_times, args.batch_size)
        figures[name] = {
            "bits_per_token": round(float(bits.sum() / tokens.sum()), 3),
            "interval": interval(bits, tokens),
            "bits_per_letter": round(float(bits.sum() / letters.sum()), 3),
            "bits_per_report": round(float(bits.mean()), 1),
        }
    MeDiMModel.attention = free  # type: ignore[method-assign]
    said: dict[str, Any] = {"reports": len(reports), "validation": curves(runs), "bits": figures}
    if args.svg:
        title = "Validation, nats a masked token of real reports"
        args.svg.write_text(as_svg(said["validation"], title))
    first = next(iter(figures.values()))["bits_per_token"]
    rows = [["run", "bits a token, 95%", "the first against it", "bits a letter"]]
    for name, f in figures.items():
        against = f"{first / f['bits_per_token'] - 1:+.1%}"
        rows.append([name, f"{f['bits_per_token']} {f['interval']}", against, str(f["bits_per_letter"])])
    print(table(rows))
    finish("backbone", said, argv=argv, device=device, seed=0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
