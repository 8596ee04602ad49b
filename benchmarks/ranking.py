"""Does a model find the true partner of an image, and of a report?

    python -m benchmarks.ranking --model demo --studies 200        # X-rays of the split test; 2 cores: see docs/LOG.md
    python -m benchmarks.ranking --model demo --studies 8 --n-times 2   # small

Study i of the embedded data stands against study j, the next one whose set of findings is another. Report: does
(image i, report i) fit better than (image i, report j)? Image: better than (image j, report i)? `medim.likelihood`
has the equations. The hard cases are those whose findings differ by one: they have rows of their own.
Prints a table, then one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/ranking.py` runs too

from benchmarks.report import finish
from medim import MeDiM, Study
from medim.cli.common import pick_device, quiet
from medim.data import embedded, phantom
from medim.likelihood import DIRECTIONS, REPORT_SHARE


def contests(domain: str, count: int, split: str, seed: int, pixels: int) -> list[tuple[Study, Study]]:
    """Study i and the next one with other findings, for the first `count` studies of a split."""
    parse, make = embedded.PARSERS[domain], embedded.DOMAINS[domain]
    studies = [make(seed, index, split, pixels=pixels) for index in range(2 * count + 20)]
    found = [parse(study.report) for study in studies]
    return [
        (studies[i], next(studies[j] for j in range(i + 1, len(studies)) if found[j] != found[i])) for i in range(count)
    ]


def fits(model: MeDiM, pairs: Sequence[tuple[Study, Study]], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Bits by direction, [N, 3]: the true pair, the other report, the other image; all with the same masks."""
    studies = []
    for mine, other in pairs:
        studies += [mine, replace(mine, report=other.report), replace(mine, images=other.images)]
    bits: dict[str, np.ndarray] = {}
    with tqdm(total=2 * len(studies), desc="ranking", unit="fit") as bar:
        for direction in ("report", "image"):
            found = model.fit(
                studies, direction=direction, n_times=args.n_times, seed=args.seed,
                batch_size=args.batch_size, progress=bar.update,
            )  # fmt: skip
            bits[direction] = np.array([fit.bits for fit in found]).reshape(-1, 3)
    return bits | {"both": REPORT_SHARE * bits["report"] + (1 - REPORT_SHARE) * bits["image"]}


def figures(bits: dict[str, np.ndarray], differ: np.ndarray) -> dict[str, Any]:
    """Share of the contests that the true pair wins, by direction of the fit and by what is exchanged."""
    table: dict[str, Any] = {}
    for direction in DIRECTIONS:
        true, *others = bits[direction].T
        table[direction] = {}
        for what, other in zip(("report", "image"), others, strict=True):
            won = true > other
            low, high = wilson(int(won.sum()), len(won))
            hard = won[differ == 1]
            table[direction][what] = {
                "accuracy": float(won.mean()), "interval": [low, high],
                "one_finding": float(hard.mean()) if len(hard) else None, "one_finding_contests": len(hard),
            }  # fmt: skip
    return table


def wilson(won: int, of: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22, 209)."""
    share, weight = won / of, z * z / of
    half = z * math.sqrt(share * (1 - share) / of + weight / (4 * of))
    return (share + weight / 2 - half) / (1 + weight), (share + weight / 2 + half) / (1 + weight)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--studies", type=int, default=200)
    parser.add_argument("--domain", default="xray", choices=list(embedded.DOMAINS))
    parser.add_argument("--split", default="test", choices=list(phantom.SPLITS))
    parser.add_argument("--study-seed", type=int, default=0, help="other than 0: studies that no training has seen (0)")
    parser.add_argument("--n-times", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=24)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv)
    quiet()
    device = pick_device(args.device)
    model = MeDiM.from_pretrained(args.model, device)
    side = embedded.side_for(model.joint.image.config.resolution)
    pairs = contests(args.domain, args.studies, args.split, args.study_seed, side)
    started = time.perf_counter()
    bits = fits(model, pairs, args)
    seconds = time.perf_counter() - started
    parse = embedded.PARSERS[args.domain]
    changed = [
        [name for name, here in parse(mine.report).items() if here != parse(other.report)[name]]
        for mine, other in pairs
    ]
    table = figures(bits, np.array([len(names) for names in changed]))
    print(f"{'fit by':8}{'against':10}{'wins':>8}  {'95% interval':16}one finding differs")
    for direction, by_what in table.items():
        for what, row in by_what.items():
            hard = "-" if row["one_finding"] is None else f"{row['one_finding']:.3f}"
            low, high = row["interval"]
            print(
                f"{direction:8}{what:10}{row['accuracy']:8.3f}  [{low:.3f}, {high:.3f}]  "
                f"{hard} of {row['one_finding_contests']}"
            )
    true, *others = bits["both"].T
    lost: list[dict[str, str | float | list[str]]] = []
    for what, rival in zip(("report", "image"), others, strict=True):
        for i in np.flatnonzero(true <= rival):
            mine, other = pairs[i]
            lost.append({"id": mine.id, "against": other.id, "exchanged": what, "differ": changed[i]})
            print(f"lost by both: {mine.id} against {what} of {other.id}: {', '.join(changed[i])}")
    finish(
        "ranking",
        {
            "ranking": table,
            "lost": lost,
            "mean_bits": {direction: values.mean(0).tolist() for direction, values in bits.items()},
            "seconds": seconds,
            "options": {**vars(args), "device": device},
        },
        argv=sys.argv[1:] if argv is None else argv,
        device=device,
        seed=args.seed,
    )


if __name__ == "__main__":
    main()
