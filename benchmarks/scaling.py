"""Bits against compute: three networks, three sizes of data, a fit, and what it says of larger ones.

    python -m benchmarks.scaling runs/scaling
    python -m benchmarks.scaling runs/scaling --steps 20 --studies 64,128,256   # small

Our recipe (`benchmarks.recipe`), whose rate does not fall, so that each validation of a run is the end of a shorter
one, on embedded studies. L is the bound in bits of a whole X-ray pair, held-out, averaged weights. Of the largest data,
of which no study is seen twice, all points are fitted by L = E + A / N^a + B / S^b (Hoffmann et al. 2022, arXiv
2203.15556, section 3.3): N weights without embeddings, S studies seen; intervals by leaving out a network, or the
points of a step, in turn. The smaller data, seen again and again, say what repeating costs. Writes OUT/scaling.png;
prints tables, then one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import least_squares

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/scaling.py` runs too

from benchmarks.recipe import CONFIG, SHARED, Job, curve, overrides, recipes, train
from benchmarks.report import finish, table
from medim.cli import run
from medim.config import load
from medim.errors import UserError
from medim.estimate import estimate
from medim.model.flops import total
from medim.recipe import TrainConfig, make_task
from medim.training.memory import Sharing

NETWORKS = {"small": (64, 2, 176), "middle": (96, 4, 256), "large": (160, 6, 432)}  # width, layers, MLP
FAR = {"1B on MIMIC-CXR": (1e9, 368_960), "7B on MIMIC-CXR": (7e9, 368_960)}  # weights, studies (each once)
BATCH = int(SHARED["train.batch_size"])

Point = tuple[float, float, float]  # weights, studies seen, bits


def settings(name: str) -> dict[str, str]:
    """Of our recipe with a network."""
    width, layers, inner = NETWORKS[name]
    shape = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": inner}
    known, _ = recipes()["ours"]
    shaped = {f"model.backbone.{key}": str(value) for key, value in shape.items()}
    return known | shaped | {"model.rows": "codebook"}  # as docs/scaling.md was, by another map


def sizes(name: str) -> tuple[int, float]:
    """Weights without embeddings and head, and FLOPs of a step."""
    budget = estimate(load(CONFIG, overrides(settings(name), Path("none"), 0, 0), TrainConfig), Sharing())
    weights = sum(n for part, (n, _) in budget.parameters.items() if part not in ("embeddings", "head"))
    return weights, total(budget.needed)


def predict(theta: Any, weights: Any, seen: Any) -> Any:
    """L of theta = (log E, log A, a, log B, b)."""
    e, a_log, a, b_log, b = theta
    return np.exp(e) + np.exp(a_log - a * np.log(weights)) + np.exp(b_log - b * np.log(seen))


def fit(points: Sequence[Point]) -> np.ndarray:
    """Least squares of log L, Huber with delta 1e-3, the best of several starts (Hoffmann et al. 2022, section 3.3)."""
    weights, seen, bits = np.array(points).T
    best = None
    for floor in (0.5, 0.8, 0.95):
        for power in (0.2, 0.5, 1.0):
            rest = (1 - floor) * bits.min() + 1e-3
            start = [
                np.log(floor * bits.min()),
                np.log(rest) + power * np.log(weights.mean()),
                power,
                np.log(rest) + power * np.log(seen.mean()),
                power,
            ]
            found = least_squares(
                lambda theta: np.log(predict(theta, weights, seen)) - np.log(bits),
                start,
                bounds=([-20, -20, 0, -20, 0], [20, 40, 3, 40, 3]),
                loss="huber",
                f_scale=1e-3,
                max_nfev=4000,
            )
            best = found if best is None or found.cost < best.cost else best
    assert best is not None
    return best.x


def draw(curves: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Bits against compute, on log axes: a hue a network, a line style a size of the data."""
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("the picture needs matplotlib: pip install matplotlib, or --no-picture") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    hues = dict(zip(NETWORKS, ("tab:cyan", "tab:blue", "tab:purple"), strict=True))
    for number, (label, points) in enumerate(curves.items()):
        style = (":", "--", "-")[number % 3]
        axis.plot(*zip(*points, strict=True), style, marker=".", color=hues[label.partition(",")[0]], label=label)
    axis.set(xscale="log", yscale="log", xlabel="FLOPs", ylabel="bits of an X-ray pair (bound), validation")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return run(_main, argv)


def measure(args: argparse.Namespace, studies: Sequence[int]) -> dict[str, Any]:
    """Train everything, and fit what was found."""
    runs = [(name, size) for name in reversed(NETWORKS) for size in studies]
    for size in studies:  # before several runs ask for it at once
        more = [f"run_dir={args.out / 'data'}", "validation.every=1", f"validation.studies={args.validation}"]
        make_task(load(CONFIG, [*overrides(settings("small"), args.out / str(size), size, 0), *more], TrainConfig))

    def one(name: str, size: int) -> Path:
        here = argparse.Namespace(**vars(args) | {"out": args.out / str(size), "studies": size})
        return train(Job(name, settings(name), 0), args.steps, here)

    with ThreadPoolExecutor(args.jobs) as pool:
        folders = dict(zip(runs, pool.map(lambda run: one(*run), runs), strict=True))
    known = {name: sizes(name) for name in NETWORKS}
    curves = {run: [(point["step"], point["pair/xray"]) for point in curve(folders[run])] for run in runs}
    points = [
        (float(known[name][0]), step * BATCH, bits) for name in NETWORKS for step, bits in curves[name, studies[-1]]
    ]
    return {
        "networks": {name: {"weights": n, "flops_a_step": c} for name, (n, c) in known.items()},
        "curves": {
            f"{n}, {size} studies": [(s * known[n][1], bits) for s, bits in curves[n, size]] for n, size in runs
        },
        **laws(points),
    }


def laws(points: Sequence[Point]) -> dict[str, Any]:
    """The fit, what it says of larger runs, and both without a network or a step in turn."""
    thetas = [fit(points)]
    for place in (0, 1):
        thetas += [fit([p for p in points if p[place] != out]) for out in sorted({p[place] for p in points})]

    def spread(values: Sequence[float]) -> dict[str, float]:
        return {"value": float(values[0]), "low": float(min(values)), "high": float(max(values))}

    weights, seen, bits = np.array(points).T
    found: dict[str, Any] = {"E": spread([np.exp(theta[0]) for theta in thetas])}
    found |= {name: spread([theta[place] for theta in thetas]) for name, place in (("a", 2), ("b", 4))}
    found |= {f"L, {name}": spread([predict(theta, *run) for theta in thetas]) for name, run in FAR.items()}
    off = np.abs(np.log(predict(thetas[0], weights, seen) / bits)).max()
    return {"law": found, "largest_deviation": float(off)}


def show(found: dict[str, Any], studies: Sequence[int]) -> str:
    """The tables."""
    rows = [["bits of a pair", "weights", "GFLOPs a step", *(f"{size} studies" for size in studies)]]
    for name, one in found["networks"].items():
        last = [found["curves"][f"{name}, {size} studies"][-1][1] for size in studies]
        cost = f"{one['flops_a_step'] / 1e9:.1f}"
        rows.append([name, f"{one['weights']:,}", cost, *(f"{bits:.1f}" for bits in last)])
    text = table(rows)
    rows = [["L = E + A/N^a + B/S^b", "fit", "lowest", "highest"]]
    rows += [[key, *(f"{one[end]:.3g}" for end in ("value", "low", "high"))] for key, one in found["law"].items()]
    return (
        f"{text}\n\n{table(rows)}\n\nlargest deviation of a point from the fit: {100 * found['largest_deviation']:.1f}%"
    )


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the runs, which are kept")
    parser.add_argument("--steps", type=int, default=800, help="of each run (800)")
    parser.add_argument("--studies", default="400,1600,6400", help="three sizes of the data (400,1600,6400)")
    parser.add_argument("--validation", type=int, default=96, help="studies (96)")
    parser.add_argument("--points", type=int, default=5, help="of each curve (5)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a core each (2)")
    parser.add_argument("--no-picture", action="store_true", help="do not draw OUT/scaling.png")
    args = parser.parse_args(argv)
    said = args.studies.split(",")
    if len(said) != 3 or not all(one.isdigit() and int(one) for one in said):
        raise UserError(f"--studies {args.studies}: three numbers such as 400,1600,6400")
    studies = sorted(map(int, said))
    if studies[-1] < args.steps * BATCH:
        raise UserError(f"--studies: {args.steps} steps see {args.steps * BATCH}: the largest needs as many")
    args.out = args.out.resolve()
    found = measure(args, studies)
    print(show(found, studies))
    if not args.no_picture:
        draw(found["curves"], args.out / "scaling.png")
        print(f"picture: {args.out / 'scaling.png'}", file=sys.stderr)
    finish("scaling", found, argv=argv, device="cpu", seed=0, packages=("scipy",))


if __name__ == "__main__":
    sys.exit(main())
