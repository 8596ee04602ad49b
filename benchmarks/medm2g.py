"""What each part of MedM2G adds to masked diffusion on one canvas: the ablation of docs/medm2g.md.

    python -m benchmarks.medm2g runs/medm2g                                   # 6 arms, 3 seeds: 30 minutes on 2 cores
    python -m benchmarks.medm2g runs/medm2g --steps 10 --seeds 1 --limit 2    # small

Needs what configs/train/brain.yaml needs (docs/medm2g.md has the commands). All arms see the same studies for the same
steps, by two of the config's four layers; one setting differs. Held-out slabs of MNI152: PSNR and SSIM of grey matter
from T1, bits a masked report token, Dice of the regions that a report names, its sides and its form aside. Colin27, a
head that nobody trained on: recall@1 of its reports among all of them, given an image, and the reverse. What was
measured is kept: the same command goes on where it was.
Prints a table (mean over seeds, half the range), then one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/medm2g.py` runs too

from benchmarks.report import finish, table
from medim.cli import run
from medim.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = ["objective.align=0", "model.embed=0", "model.backbone.num_hidden_layers=2", "train.ema=0.98"]
BASE += ["train.precision=fp32", "log.every=10"]  # so small a network is faster so
SINGLE = "{until: 0.2, show: [text, t1]}, {until: 0.4, show: [text, gm]}, {until: 0.6, show: [t1, gm]}"
ARMS = {
    "none of it": [],
    "alignment": ["objective.align=0.1", "model.embed=64"],
    "invariance": ["objective.invariance=0.01", "model.embed=64"],
    "multi-flow": [f"stages=[{SINGLE}]"],
    "gates": ["model.gates=true"],
    "1-D positions": ["model.alibi=[]", "model.positions=row"],
}
FIGURES = {  # what it is called in the table, and decimals
    "psnr": ("PSNR", 2),
    "ssim": ("SSIM", 3),
    "bits_per_token": ("bits a masked token", 3),
    "region_dice": ("region Dice", 3),
    "image_to_text_recall@1": ("image to text @1", 4),
    "text_to_image_recall@1": ("text to image @1", 4),
}


def regions(text: str) -> frozenset[str]:
    """What a well-formed report names, each with its side."""
    from medim.data.atlas import read_report

    return read_report(text).regions


def dice(text: str, other: str, phrases: set[str]) -> float:
    """Dice of the phrases that occur in two texts, well-formed or not; sides do not count."""
    a, b = ({phrase for phrase in phrases if phrase in one.lower()} for one in (text, other))
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.0


def measure(model: Path, out: Path, data: Path, limit: int | None, aligned: bool) -> dict[str, float]:
    """The figures of one model."""
    from eval.run import main as evaluate
    from medim.cli.common import quiet
    from medim.config import load
    from medim.data import prepare
    from medim.given import Request
    from medim.pipeline import MeDiM
    from medim.sampling import Sampling
    from medim.search import Index, open_data

    quiet()
    said = [
        "eval/translation.yaml",
        "--model",
        str(model),
        "--out",
        str(out),
        *(["--limit", str(limit)] if limit else []),
    ]
    if evaluate(said):
        raise UserError(f"{out}: not evaluated")
    found = json.loads((out / "results.json").read_text())["domains"]["mri"]["tasks"]["translate"]["figures"]
    figures = {name: found[name]["value"] for name in ("psnr", "ssim")}
    figures |= {f"{name}_{end}": found[name][end] for name in ("psnr", "ssim") for end in ("floor", "ceiling")}
    last = json.loads((model.parent / "validation.jsonl").read_text().splitlines()[-1])
    figures["bits_per_token"] = last["report/mri/text"] / math.log(2)

    medim = MeDiM.from_pretrained(model)
    slabs = [one for one in prepare.load(data, medim.joint.image, "test") if one["patient_id"] == "MNI152"][:limit]
    requests = []
    for number, one in enumerate(slabs):
        first = next(image for image in one["images"] if image["view"].startswith("t1"))
        ids = np.asarray(first["codes"]) + medim.joint.vocabulary.image[0]
        picture = medim.joint.picture(ids, "mri")
        requests.append(Request(str(one["id"]), "mri", (0, number), image=picture, view=first["view"]))
    sampling = load(ROOT / "configs/sample/likeliest.yaml", [], Sampling)
    told = [sample.report for sample in medim.generate("report", requests, sampling=sampling)]
    real = [str(one["report"]) for one in slabs]
    phrases = {one.split(" ", 1)[1] for text in prepare.load(data, split="train")["report"] for one in regions(text)}
    figures["region_dice"] = float(np.mean([dice(a, b, phrases) for a, b in zip(told, real, strict=True)]))
    others = real[1:] + real[:1]
    figures["region_dice_floor"] = float(np.mean([dice(a, b, phrases) for a, b in zip(told, others, strict=True)]))
    if aligned:
        index = Index(medim, open_data(data, medim, "test", ["Colin27"]))
        for name, (value, _, _) in index.recall().items():
            if name.endswith("@1"):
                figures |= {name: value, f"{name}_floor": index.chance}
    return figures


def make(arm: str, seed: int, args: argparse.Namespace) -> dict[str, float]:
    """Train and measure one model, or read what was measured; both in processes of their own."""
    folder = args.out / f"{arm.replace(' ', '_')}-{seed}"
    kept = folder / "figures.json"
    if kept.exists():
        return dict(json.loads(kept.read_text()))
    settings = [*BASE, *ARMS[arm]]
    shape = [
        f"train.steps={args.steps}",
        f"train.warmup={max(1, args.steps // 10)}",
        f"train.batch_size={args.batch_size}",
    ]
    often = [
        f"validation.every={args.steps}",
        f"train.checkpoint_every={args.steps}",
        f"run_dir={folder}",
        f"seed={seed}",
    ]
    commands = [
        ["train.py", "configs/train/brain.yaml", f"data.path={args.data}", *settings, *shape, *often],
        ["-m", "benchmarks.medm2g", str(args.out), "--data", str(args.data), "--measure", str(folder)],
    ]
    commands[1] += ["--aligned"] if any(one.startswith("objective.align") for one in ARMS[arm]) else []
    commands[1] += ["--limit", str(args.limit)] if args.limit else []
    if not (folder / "final").exists():
        shutil.rmtree(folder, ignore_errors=True)
    for command in commands[(folder / "final").exists() :]:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(f"{arm}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    print(f"{arm}, seed {seed}: {kept.read_text()}", file=sys.stderr, flush=True)
    return dict(json.loads(kept.read_text()))


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean, and half the range."""
    return f"{np.mean(values):.{decimals}f} ± {(max(values) - min(values)) / 2:.{decimals}f}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--data", type=Path, default=Path("runs/data/brain"), help="prepared heads")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (2)")
    parser.add_argument("--limit", type=int, help="measure on so many slices only")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--aligned", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.out, args.data = args.out.resolve(), args.data.resolve()
    if args.measure:
        own = measure(args.measure / "final", args.measure / "eval", args.data, args.limit, args.aligned)
        (args.measure / "figures.json").write_text(json.dumps(own))
        return
    if not args.data.exists():
        raise UserError(f"{args.data}: no such folder; docs/medm2g.md has the commands that make it")
    runs = [(arm, seed) for seed in range(args.seeds) for arm in ARMS]
    with ThreadPoolExecutor(args.jobs) as pool:
        figures = dict(zip(runs, pool.map(lambda one: make(one[0], one[1], args), runs), strict=True))
    found = {arm: [figures[arm, seed] for seed in range(args.seeds)] for arm in ARMS}
    rows = [["", *(title for title, _ in FIGURES.values())]]
    for arm, mine in found.items():
        cells = [spread([each[k] for each in mine], d) if k in mine[0] else "-" for k, (_, d) in FIGURES.items()]
        rows.append([arm, *cells])
    every = [one for mine in found.values() for one in mine]
    for end in ("floor", "ceiling"):  # of text by the text that was made: the mean over all
        values = {k: [one[f"{k}_{end}"] for one in every if f"{k}_{end}" in one] for k in FIGURES}
        rows.append([end, *(f"{np.mean(values[k]):.{d}f}" if values[k] else "-" for k, (_, d) in FIGURES.items())])
    print(table(rows))
    finish("medm2g", found, argv=argv, device="cpu", seed=0)


if __name__ == "__main__":
    sys.exit(main())
