"""What sampling costs, each way against a named alternative, paired, in one run.

    python -m benchmarks.sampling                                    # all three parts, 2 CPU cores
    python -m benchmarks.sampling --parts cache,batch --n 8          # small, a minute

plans   pairs of the model's own plan against 128-step confidence sampling (MaskGIT's, which the paper uses): forward
        passes, positions run, and coherence of report and image, on the same studies' seeds
cache   reports with what is given computed once against computed in every pass, at 256 codes + 64 text tokens; and
        against full attention, which needs no mask, in every pass
batch   batches of 8 against one sample at a time: samples a second, and whether they are the same samples
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/sampling.py` runs too

from benchmarks import report
from eval.measure import READERS
from medim.canvas import Canvas, Segment, layout
from medim.cli.common import quiet
from medim.data import embedded
from medim.metrics import coherence
from medim.pipeline import MeDiM, Request, Sample
from medim.sampling import Plan, Sampling, sample

BASELINE = Plan("confidence", steps=128, schedule="cosine")
CODES, TEXT = 256, 64
CACHES = {"cached": ("prefix", True), "uncached": ("prefix", False), "full attention": ("full", False)}


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What `work` returns, and its seconds."""
    started = time.perf_counter()
    result = work()
    report.synchronize(str(device))
    return result, time.perf_counter() - started


def make(model: MeDiM, n: int, seed: int, sampling: Sampling, batch_size: int) -> list[Sample]:
    """`n` X-ray pairs."""
    requests = [Request(f"pair-{i:05d}", "xray", (seed, i)) for i in range(n)]
    return list(model.generate("pair", requests, batch_size=batch_size, sampling=sampling))


def plans(model: MeDiM, n: int, seed: int, batch_size: int) -> dict[str, Any]:
    """The model's own plan against two forms of the baseline: all at once, and one segment after the other."""
    own = model.sampling
    ways = {
        "own plan": own,
        "confidence 128, together": Sampling(BASELINE, BASELINE, "together"),
        "confidence 128, report first": Sampling(
            replace(BASELINE, guidance=own.report.guidance), replace(BASELINE, guidance=own.image.guidance)
        ),
    }
    found: dict[str, Any] = {}
    for name, sampling in ways.items():
        made, seconds = timed(lambda s=sampling: make(model, n, seed, s, batch_size), model.model.device)  # type: ignore[misc]
        seen = READERS["xray"]([one.image for one in made])
        told = [embedded.PARSERS["xray"](one.report) for one in made]
        found[name] = {
            "forward_passes": max(one.stats["forward_passes"] for one in made),
            "seconds_a_sample": seconds / n,
            "coherence": coherence.micro(seen, told).f1,
            "interval": coherence.bootstrap_interval(seen, told, seed=seed),
            "floor": coherence.shuffled_floor(seen, told),
        }
    passes = {name: row["forward_passes"] for name, row in found.items()}
    return {
        "ways": found,
        "samples": n,
        "passes_ratio": passes["own plan"] / 128,
        "coherence_gain": {
            name: found["own plan"]["coherence"] - row["coherence"] for name, row in found.items() if name != "own plan"
        },
    }


def cache(model: MeDiM, seed: int, batch_sizes: Sequence[int], repeats: int, steps: int = 22) -> dict[str, Any]:
    """Seconds to write reports of 64 positions for images of 256 codes, the ids drawn at random."""
    network, vocabulary = model.model, model.joint.vocabulary
    rng, found = np.random.default_rng(seed), {}
    for size in batch_sizes:
        rows = [
            layout(
                [
                    Segment("image", "xray", rng.integers(*vocabulary.image, CODES).tolist()),
                    Segment("report", "text", [vocabulary.mask] * TEXT),
                ],
                vocabulary,
            )
            for _ in range(size)
        ]
        canvas = Canvas.collate(rows, vocabulary.eos).to(network.device)
        where, made = canvas.has_role("report"), {}
        seconds: dict[str, list[float]] = {name: [] for name in CACHES}

        def write(name: str, canvas: Canvas = canvas, where: torch.Tensor = where) -> torch.Tensor:
            network.config.condition_attention, kept = CACHES[name]
            generator = torch.Generator(network.device).manual_seed(seed)
            denoiser = network.denoiser(canvas, where, cache=kept)
            plan = Plan("ancestral", steps=steps)
            return sample(denoiser, canvas.ids, where, plan, mask_id=vocabulary.mask, generator=generator)

        for _ in range(repeats + 1):
            for name in CACHES:
                made[name], spent = timed(lambda name=name: write(name), network.device)  # type: ignore[misc]
                seconds[name].append(spent)
        median = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}  # the first warms up
        found[f"batch {size}"] = {
            "seconds": median,
            "times_faster": median["uncached"] / median["cached"],
            "times_faster_than_full_attention": median["full attention"] / median["cached"],
            "same_reports": bool(torch.equal(made["cached"], made["uncached"])),
        }
    return {"codes": CODES, "text": TEXT, "steps": steps, **found}


def batch(model: MeDiM, seed: int, n: int, repeats: int) -> dict[str, Any]:
    """Samples a second at batch sizes 1 and 8."""
    seconds: dict[int, list[float]] = {1: [], 8: []}
    made: dict[int, list[Sample]] = {}
    for _ in range(repeats):
        for size in seconds:
            made[size], spent = timed(lambda s=size: make(model, n, seed, model.sampling, s), model.model.device)  # type: ignore[misc]
            seconds[size].append(spent)
    rate = {size: n / statistics.median(values) for size, values in seconds.items()}
    same = [
        a.report == b.report and np.array_equal(a.codes, b.codes) and a.image.tobytes() == b.image.tobytes()
        for a, b in zip(made[1], made[8], strict=True)
    ]
    return {"samples_a_second": rate, "times_faster": rate[8] / rate[1], "same_samples": sum(same), "samples": n}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a model folder, or demo")
    parser.add_argument("--parts", default="plans,cache,batch")
    parser.add_argument("--n", type=int, default=240, help="pairs of part plans; part batch makes a tenth (240)")
    parser.add_argument("--repeats", type=int, default=5, help="of each timing; the median counts (5)")
    parser.add_argument("--batch-size", type=int, default=24, help="of part plans (24)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    quiet()
    model = MeDiM.from_pretrained(args.model, args.device)
    parts = args.parts.split(",")
    figures: dict[str, Any] = {}
    if "batch" in parts:
        n = max(8, args.n // 80 * 8)
        figures["batch"] = batch(model, args.seed, n, max(1, args.repeats // 2))
        rate = figures["batch"]["samples_a_second"]
        print(report.table([["pairs", "samples/s"], *([f"batch {size}", f"{rate[size]:.2f}"] for size in rate)]))
        print(f"{figures['batch']['times_faster']:.2f} times; {figures['batch']['same_samples']} of {n} equal\n")
    if "plans" in parts:
        figures["plans"] = plans(model, args.n, args.seed, args.batch_size)
        rows = [["pairs", "forward passes", "s a sample", "coherence", "95% interval", "floor"]]
        for name, row in figures["plans"]["ways"].items():
            interval = "{:.3f} to {:.3f}".format(*row["interval"])
            cells = [f"{row['seconds_a_sample']:.2f}", f"{row['coherence']:.3f}", interval, f"{row['floor']:.3f}"]
            rows.append([name, str(row["forward_passes"]), *cells])
        print(report.table(rows) + "\n")
    if "cache" in parts:  # the last one: it changes the model's configuration
        figures["cache"] = cache(model, args.seed, (1, 8), args.repeats)
        rows = [["reports, 256 codes + 64 text, ms", *CACHES, "uncached / cached", "full / cached", "same"]]
        for name, row in figures["cache"].items():
            if name.startswith("batch"):
                times = [f"{1000 * row['seconds'][way]:.0f}" for way in CACHES]
                ratios = [f"{row[key]:.2f}" for key in ("times_faster", "times_faster_than_full_attention")]
                rows.append([name, *times, *ratios, str(row["same_reports"])])
        print(report.table(rows))
    report.finish("sampling", figures, argv=sys.argv[1:] if argv is None else argv, device=args.device, seed=args.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
