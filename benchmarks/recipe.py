"""Recipes at equal cost: the paper's, as its authors run it, then a ladder with one change a rung.

    python -m benchmarks.recipe runs/recipe --quick          # the signs of what is kept, one seed
    python -m benchmarks.recipe runs/recipe                  # three seeds
    python -m benchmarks.recipe runs/recipe-seconds --equal seconds
    python -m benchmarks.recipe runs/recipe-long --ends --steps 2400 --samples 32   # the paper's recipe and ours only

All recipes train one network on the same embedded X-rays and pathology tiles, in the same order, for as many steps as
the same FLOPs (or seconds) pay for. A rung has all that was kept before it and one change. Measured on validation
studies with a fixed draw of noise, by domain, as bounds (MDLM eq. 10): bits a report given its image, bits a code
given the report, and both for pairs under one noise level; a report's bits hold those of its slot's length. `gain` is
1 minus the geometric mean, over these eight, of a rung to the one below it: above 0 is better. `ours, a third` has a
third of the paper's cost. With --samples, coherence of the paper's recipe and of ours is that of `eval/demo.yaml`,
each by its plan (`configs/sample/paper.yaml`, `configs/sample/report_first.yaml`). What was trained is kept: the same
command goes on where it was. OUT/recipe.png has gains, and bits against compute. Prints a table (mean over seeds, half
the range), then one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/recipe.py` runs too

from benchmarks.report import finish, table
from medim.cli import run
from medim.config import load
from medim.errors import UserError
from medim.recipe import TrainConfig, make_task

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/train/demo_scratch.yaml"
DOMAINS = ("xray", "pathology")
CELLS = [f"{task}/{domain}/{kind}" for domain in DOMAINS for task, kind in
         (("report", "text"), ("image", "image"), ("joint", "text"), ("joint", "image"))]  # fmt: skip
TASKS = ("pair", "report", "image")
CODES = 144  # of an image of the demo's tokenizer
# The network and the run that all recipes share; 8 is the authors' global batch. One thing is not theirs: their
# learning rate, 1e-5, is of a pretrained network of billions; here it is what suits their recipe best (docs/LOG.md).
SHARED = {
    "model.backbone.hidden_size": "96",
    "model.backbone.num_hidden_layers": "3",
    "model.backbone.num_attention_heads": "4",
    "model.backbone.num_key_value_heads": "4",
    "model.backbone.intermediate_size": "256",
    "model.backbone.attn_implementation": "sdpa",
    "train.batch_size": "8",
    "train.lr": "1e-3",
    "train.precision": "fp32",
    "train.compile": "false",
    "validation.tasks": "[joint,report,image]",
}
# docs: configs/train/medim_paper.yaml says where each of them comes from
PAPER = {
    "objective.tasks": "{pair: 0, report: 0, image: 0, joint: 1}",
    "objective.first_sentence": "0.1",
    "objective.condition_dropout": "0.1",  # nothing is given, so nothing is dropped; 0 would forbid guidance
    "objective.condition_attention": "full",
    "objective.weighting": "mdlm",
    "objective.stratified": "false",
    "objective.modality_weights": "{text: 1, image: 1}",
    "model.adaln_start": "random",
    "model.adaln_dim": "96",
    "model.places": "0",
    "model.alibi": "[]",
    "model.backbone.rotary_fraction": "1",
    "train.optimizer": "adamw",
    "train.ema": "0",
    "train.warmup": "0",
    "train.decay_from": "1",
    "slot": "{multiple: 44, longest: 44}",
}


@dataclass(frozen=True)
class Rung:
    """One change.

    Attributes:
        settings: of the config, over those of all kept rungs before.
        kept: whether the rungs after it have it: what the full table shows.
    """

    settings: dict[str, str]
    kept: bool = True


def tasks(mixture: str) -> dict[str, str]:
    """Tasks with a condition, never dropped."""
    return {"objective.tasks": mixture, "objective.condition_dropout": "0"}


LADDER = {
    "min-SNR weights": Rung({"objective.weighting": "min_snr"}),
    "2-D positions": Rung(
        {"model.places": "144", "model.backbone.rotary_fraction": "0.5", "model.alibi": "[4.0, 1.0, 0.25, 0.0]"}
    ),
    "Muon": Rung({"train.optimizer": "muon", "train.muon_lr": "8e-3", "train.lr": "2e-3"}),
    "text weighs 3": Rung({"objective.modality_weights": "{text: 3, image: 1}"}),
    "averaged weights": Rung({"train.ema": "0.98"}),
    "narrow AdaLN": Rung({"model.adaln_dim": "32"}),
    "rows of the codebook": Rung({"model.rows": "codebook"}, kept=False),
    "stratified noise": Rung({"objective.stratified": "true"}, kept=False),
    "no clean first sentence": Rung({"objective.first_sentence": "0"}, kept=False),
    "flat weights": Rung({"objective.weighting": "flat"}, kept=False),
    "identity gates": Rung({"model.adaln_start": "identity"}, kept=False),
    "warm-up": Rung({"train.warmup": "20"}, kept=False),
    "decay": Rung({"train.decay_from": "0.5"}, kept=False),
    "slots by length": Rung({"slot": "{multiple: 8, longest: 48}"}, kept=False),
    "independent levels": Rung({"objective.tasks": "{joint: 0, pair: 1, report: 0, image: 0}"}, kept=False),
    "task mixture": Rung(tasks("{joint: 0, pair: 0.4, report: 0.3, image: 0.3}"), kept=False),
    "joint and tasks, prefix attention": Rung(
        tasks("{joint: 0.5, pair: 0, report: 0.3, image: 0.2}") | {"objective.condition_attention": "prefix"},
        kept=False,
    ),
}


@dataclass(frozen=True)
class Job:
    """A training: a recipe, a seed, and which part of the paper's cost it may take."""

    name: str
    recipe: dict[str, str]
    seed: int
    share: float = 1.0

    def folder(self, steps: int, studies: int) -> str:
        """Of its run: another one for another recipe of the same name."""
        said = json.dumps([SHARED, self.recipe, steps, studies], sort_keys=True)
        plain = self.name.replace(" ", "_").replace(",", "")
        return f"{plain}-{self.seed}-{hashlib.sha256(said.encode()).hexdigest()[:8]}"


def recipes(quick: bool = False, ends: bool = False) -> dict[str, tuple[dict[str, str], str]]:
    """Each recipe's settings, and the recipe that it is one change from; if `quick`, of what is kept only; if `ends`,
    the first and the last."""
    below, settings = "paper", dict(PAPER)
    found = {"paper": (settings, "")}
    for name, rung in LADDER.items():
        if quick and not rung.kept:
            continue
        found[name] = (settings | rung.settings, below)
        if rung.kept:
            below, settings = name, settings | rung.settings
    ours = {"ours": (settings, "paper")}
    return {"paper": found["paper"]} | ours if ends else found | ours


def overrides(recipe: dict[str, str], data: Path, studies: int, seed: int) -> list[str]:
    """As on train.py's command line."""
    said = SHARED | recipe | {"data.path": str(data / f"data-{seed}"), "data.studies": str(studies), "seed": str(seed)}
    return [f"{key}={value}" for key, value in said.items()]


def flops(recipe: dict[str, str]) -> float:
    """Of a step: what the mathematics needs."""
    from medim.estimate import estimate
    from medim.model.flops import total
    from medim.training.memory import Sharing

    config = load(CONFIG, overrides(recipe, Path("none"), 0, 0), TrainConfig)
    return total(estimate(config, Sharing()).needed)


def python(command: Sequence[str], what: str) -> None:
    """Run it in a process of its own, on one core."""
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    if done.returncode:
        raise UserError(f"{what}: {(done.stderr.strip() or 'killed').splitlines()[-1]}")


def rows_of(path: Path) -> list[dict[str, Any]]:
    """Of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(job: Job, steps: int, args: argparse.Namespace, timing: bool = False) -> Path:
    """Train one model, unless it is there; without validation if only its time is wanted."""
    folder = args.out / ("timing" if timing else "") / job.folder(steps, args.studies)
    if not (folder / "final").exists():
        shutil.rmtree(folder, ignore_errors=True)
        often = 0 if timing else -(-steps // args.points)
        said = [f"train.steps={steps}", f"run_dir={folder}", f"train.checkpoint_every={steps}"]
        said += [f"log.every={max(1, steps // 8)}"]
        said += [f"validation.every={often}", f"validation.studies={args.validation}"]
        python(["train.py", str(CONFIG), *overrides(job.recipe, args.out, args.studies, job.seed), *said], job.name)
        print(f"{job.name}, seed {job.seed}: trained", file=sys.stderr, flush=True)
    return folder


def slot_bits(folder: Path) -> dict[str, tuple[float, float]]:
    """Of each domain, the mean length of a report's slot, and the entropy of the lengths in bits."""
    found = {}
    for domain, lengths in json.loads((folder / "final/report_slots.json").read_text()).items():
        length, p = np.array([int(k) for k in lengths]), np.array(list(lengths.values()), dtype=float)
        p /= p.sum()
        found[domain] = float((length * p).sum()), float(-(p * np.log2(p)).sum())
    return found


def curve(folder: Path) -> list[dict[str, float]]:
    """At each validation: its step, the eight figures in bits (of a report, of a code), a pair's and those a token."""
    slots, found = slot_bits(folder), []
    for row in rows_of(folder / "validation.jsonl"):
        point = {"step": float(row["step"])}
        for cell in CELLS:
            _, domain, kind = cell.split("/")
            bits = row[f"{cell}/token"] / math.log(2)
            point[cell] = bits * slots[domain][0] + slots[domain][1] if kind == "text" else bits
        for domain in DOMAINS:
            point[f"pair/{domain}"] = point[f"joint/{domain}/text"] + CODES * point[f"joint/{domain}/image"]
            point[f"token/{domain}"] = point[f"pair/{domain}"] / (slots[domain][0] + CODES)
        point["token/both"] = float(np.mean([point[f"token/{domain}"] for domain in DOMAINS]))
        found.append(point)
    return found


def seconds_a_step(folder: Path, batch_size: int) -> float:
    """Of training alone: the median over the log's lines."""
    return batch_size / float(np.median([row["samples_per_s"] for row in rows_of(folder / "metrics.jsonl")[1:]]))


def gain(mine: dict[str, float], other: dict[str, float]) -> float:
    """1 - geometric mean of the ratios."""
    return 1 - math.exp(np.mean([math.log(mine[cell] / other[cell]) for cell in CELLS]))


def coherence(folder: Path, sampling: str, args: argparse.Namespace) -> dict[str, float]:
    """Micro-F1 and floor by domain and task; forward passes are in the plan."""
    out = folder / f"eval-{Path(sampling).stem}"
    said = [f"sampling={sampling}", "likelihood.studies=0", "rank.studies=0", "memorisation.studies=0", "text=[]"]
    said += ["image=[]", f"studies={args.samples}"]
    python(
        ["-m", "eval.run", "eval/demo.yaml", *said, "--model", str(folder / "final"), "--out", str(out)], str(folder)
    )
    found = json.loads((out / "results.json").read_text())["domains"]
    figures: dict[str, float] = {}
    for domain in DOMAINS:
        for task in TASKS:
            cell = found[domain]["tasks"][task]["figures"]["coherence"]
            figures |= {f"{task}/{domain}": cell["value"], f"{task}/{domain}/floor": cell["floor"]}
    return figures


def spread(values: Sequence[float], decimals: int) -> str:
    """Mean, and half the range."""
    return f"{np.mean(values):.{decimals}f} ± {(max(values) - min(values)) / 2:.{decimals}f}"


def draw(found: dict[str, Any], path: Path) -> None:
    """Gains of the rungs, and bits against compute of the paper's recipe and ours, as a picture."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or --no-picture") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    gains = {name: found["recipes"][name]["gain"] for name in LADDER if name in found["recipes"]}
    panels = 3 if gains else 2
    figure, axes = pyplot.subplots(1, panels, figsize=(5 * panels, max(4, 0.25 * len(gains) + 1)), layout="constrained")
    for place, (name, values) in enumerate(reversed(gains.items())):
        colour = "tab:blue" if found["recipes"][name]["kept"] else "tab:gray"
        axes[0].barh(place, 100 * np.mean(values), color=colour)
        axes[0].plot([100 * value for value in values], [place] * len(values), "k.", ms=4)
    if gains:
        axes[0].set_yticks(range(len(gains)), list(reversed(gains)))
        axes[0].axvline(0, color="k", lw=0.8)
        axes[0].set_xlabel("gain over the rung below, % (blue: kept; a dot a seed)")
    for axis, cell, unit in zip(
        axes[-2:], ("report/xray/text", "image/xray/image"), ("bits a report", "bits a code"), strict=True
    ):
        for name, colour in (("paper", "tab:red"), ("ours", "tab:blue"), ("ours, a third", "tab:cyan")):
            for number, points in enumerate(found["recipes"][name]["curves"]):
                compute = [point["step"] * found["recipes"][name]["flops_a_step"] for point in points]
                label = name if number == 0 else None
                axis.plot(compute, [point[cell] for point in points], ".-", color=colour, alpha=0.7, label=label)
        axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel=f"X-ray, {unit}, validation")
        axis.xaxis.set_minor_formatter("")
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("{x:g}")
        axis.legend(frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Train everything, and put together what was found."""
    known = recipes(args.quick, args.ends)
    costs = {name: flops(recipe) for name, (recipe, _) in known.items()}
    for seed in range(args.seeds):  # before several runs ask for it at once
        more = [f"run_dir={args.out / 'data'}", "validation.every=1", f"validation.studies={args.validation}"]
        make_task(load(CONFIG, [*overrides(PAPER, args.out, args.studies, seed), *more], TrainConfig))
    price = costs
    if args.equal == "seconds":
        price = {}
        for name, (recipe, _) in known.items():  # one at a time, on one core
            timed = train(Job(name, recipe, 0), 64, args, timing=True)
            price[name] = seconds_a_step(timed, int(SHARED["train.batch_size"]))
    steps = {name: max(args.points, round(args.steps * price["paper"] / price[name])) for name in known}
    jobs = [Job(name, recipe, seed) for seed in range(args.seeds) for name, (recipe, _) in known.items()]
    top = next((name for name in reversed(LADDER) if name in known and LADDER[name].kept), "ours")
    jobs = [job for job in jobs if job.name != "ours" or top == "ours"]  # it is the top of the ladder
    jobs += [Job("ours, a third", known["ours"][0], seed, 1 / 3) for seed in range(args.seeds)]
    steps["ours, a third"], costs["ours, a third"] = max(args.points, round(steps["ours"] / 3)), costs["ours"]
    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(
            zip(
                ((job.name, job.seed) for job in jobs),
                pool.map(lambda job: train(job, steps[job.name], args), jobs),
                strict=True,
            )
        )
        folders |= {("ours", seed): folders[top, seed] for seed in range(args.seeds)}
        sampled = [(name, seed) for name in ("paper", "ours") for seed in range(args.seeds)] if args.samples else []
        plans = {"paper": "configs/sample/paper.yaml", "ours": "configs/sample/report_first.yaml"}
        f1 = dict(
            zip(sampled, pool.map(lambda one: coherence(folders[one], plans[one[0]], args), sampled), strict=True)
        )
    found: dict[str, Any] = {}
    for name in [*known, "ours, a third"]:
        curves = [curve(folders[name, seed]) for seed in range(args.seeds)]
        below = known[name][1] if name in known else "paper"
        last = [curve(folders[below, seed])[-1] for seed in range(args.seeds)] if below else []
        found[name] = {
            "kept": name not in LADDER or LADDER[name].kept,
            "settings": LADDER[name].settings if name in LADDER else {},
            "below": below,
            "gain": [gain(mine[-1], other) for mine, other in zip(curves, last, strict=True)] if below else [],
            "steps": steps[name],
            "flops_a_step": costs[name],
            "seconds_a_step": [
                seconds_a_step(folders[name, s], int(SHARED["train.batch_size"])) for s in range(args.seeds)
            ],
            "curves": curves,
            "coherence": [f1[name, seed] for seed in range(args.seeds)] if (name, 0) in f1 else [],
        }
    return {"equal": args.equal, "shared": SHARED, "paper": PAPER, "recipes": found}


def show(found: dict[str, Any]) -> str:
    """The table of bits, and that of coherence."""
    title = {"report/text": "report|image", "image/image": "image|report", "joint/text": "pair: report"}
    title |= {"joint/image": "pair: code"}
    heads = [f"{d[:5]} {title[f'{t}/{k}']}" for t, d, k in (cell.split("/") for cell in CELLS)]
    tokens = [f"token/{part}" for part in (*DOMAINS, "both")]
    heads += [f"{part.split('/')[1][:5]} bits/token" for part in tokens]
    rows = [["", "kept", "gain, %", "steps", "s/step", *heads]]
    for name, one in found["recipes"].items():
        cells = [spread([c[-1][cell] for c in one["curves"]], 2) for cell in [*CELLS, *tokens]]
        won = spread([100 * value for value in one["gain"]], 1) if one["gain"] else "-"
        kept = "yes" if one["kept"] else "no"
        rows.append([name, kept, won, str(one["steps"]), f"{np.mean(one['seconds_a_step']):.2f}", *cells])
    text = table(rows)
    told = {name: one["coherence"] for name, one in found["recipes"].items() if one["coherence"]}
    if told:
        heads = [f"{domain} {task}" for domain in DOMAINS for task in TASKS]
        rows = [["coherence, F1", *heads]]
        for name, mine in told.items():
            for part, end in ((name, ""), (f"{name}, floor", "/floor")):
                cells = [
                    spread([one[f"{task}/{domain}{end}"] for one in mine], 3) for domain in DOMAINS for task in TASKS
                ]
                rows.append([part, *cells])
        text += "\n\n" + table(rows)
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs, which are kept")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--quick", action="store_true", help="what is kept only, one seed")
    part.add_argument("--ends", action="store_true", help="the paper's recipe and ours only")
    parser.add_argument("--equal", choices=["flops", "seconds"], default="flops", help="what is equal (flops)")
    parser.add_argument("--steps", type=int, default=600, help="of the paper's recipe (600)")
    parser.add_argument("--seeds", type=int, help="(3)")
    said = "a domain and task, for coherence, which shows nothing before some 1,000 steps; 0: none (0)"
    parser.add_argument("--samples", type=int, default=0, help=said)
    parser.add_argument("--studies", type=int, default=6000, help="of the training set (6000)")
    parser.add_argument("--validation", type=int, default=64, help="studies (64)")
    parser.add_argument("--points", type=int, default=4, help="of each curve (4)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (2)")
    parser.add_argument("--no-picture", action="store_true", help="do not draw OUT/recipe.png")
    args = parser.parse_args(argv)
    args.seeds = args.seeds or (1 if args.quick else 3)
    for name in ("steps", "seeds", "studies", "validation", "points", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: give 1 or more")
    if args.steps < args.points:
        raise UserError(f"--steps {args.steps}: fewer than the --points {args.points} of a curve")
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    found = measure(args)
    print(show(found))
    if not args.no_picture:
        draw(found, args.out / "recipe.png")
        print(f"picture: {args.out / 'recipe.png'}", file=sys.stderr)
    finish("recipe", found, argv=argv, device="cpu", seed=0)


if __name__ == "__main__":
    sys.exit(main())
