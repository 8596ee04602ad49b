"""What preparing and reading a dataset costs, and whether being killed changes a byte of it.

    python -m benchmarks.prepare                                # 20,000 embedded studies; 2 cores: see docs/LOG.md
    python -m benchmarks.prepare --studies 400 --shard-size 100 --copies 3   # small, about a minute

killed     a run killed (SIGKILL) three times at random moments and started again, against an uninterrupted one: are all
           files equal, byte for byte?
processes  one single-thread process against two (--shard 0/2 and 1/2)
reading    studies read in training order as rows of a canvas, against what the demo model consumes while training; and
           the resident memory of the reading process, its own and what it has mapped of files (libraries and shards;
           the kernel takes such pages back when memory is short), also for a dataset ten times as large
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/prepare.py` runs too

ROOT = Path(__file__).parents[1]
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(out: Path, studies: int, shard_size: int, *more: str) -> list[str]:
    """One process of `medim prepare`."""
    flags = ["--studies", str(studies), "--shard-size", str(shard_size), "--out", str(out), *more]
    return [sys.executable, "-m", "medim", "prepare", "demo", *flags]


def run(*commands: Sequence[str]) -> float:
    """Seconds of commands at the same time."""
    started = time.perf_counter()
    nowhere = subprocess.DEVNULL
    processes = [subprocess.Popen(one, env=ALONE, stdout=nowhere, stderr=nowhere) for one in commands]
    if any([process.wait() for process in processes]):
        raise RuntimeError(f"failed: {' '.join(commands[0])}")
    return time.perf_counter() - started


def killed(out: Path, studies: int, shard_size: int, seconds: float, seed: int) -> list[float]:
    """Prepare, killed three times; returns the seconds after which it was."""
    moments = [random.Random(seed + n).uniform(0.1, 0.5) * seconds for n in range(3)]
    for moment in moments:
        process = subprocess.Popen(
            command(out, studies, shard_size), env=ALONE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    run(command(out, studies, shard_size))
    return moments


def same(one: Path, other: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} for folder in (one, other)]
    return files[0] == files[1] and all(filecmp.cmp(one / name, other / name, shallow=False) for name in files[0])


def enlarge(folder: Path, out: Path, copies: int) -> None:
    """A dataset that holds another one `copies` times, in files of its own."""
    shutil.copytree(folder, out)
    index = json.loads((out / "index.json").read_text())
    for copy in range(1, copies):
        for n in range(index["shards"]):
            shutil.copy(folder / f"shard-{n:05d}.arrow", out / f"shard-{copy * index['shards'] + n:05d}.arrow")
    for key in ("studies", "shards"):
        index[key] *= copies
    index["splits"] = {split: count * copies for split, count in index["splits"].items()}
    (out / "index.json").write_text(json.dumps(index))


def read(folder: str, count: int) -> None:
    """Read `count` studies as training does, in this process; prints JSON."""
    from medim.data.order import Order
    from medim.data.prepare import load, read_index, text_hash
    from medim.pipeline import ASSETS
    from medim.tokenization.joint import JointTokenizer
    from medim.training.task import Rows

    joint = JointTokenizer.from_pretrained(ASSETS / "demo")
    data = load(folder, joint.image, split="train")
    rows = Rows(joint, [data], fits=read_index(folder)["text_tokenizer"] == text_hash(joint.text))
    order, batch = Order(0, (len(data),)), 32
    started = time.perf_counter()
    for step in range(count // batch):
        for source, study in zip(*order.batch(step, batch), strict=True):
            rows.row(int(source), int(study))
    seconds = time.perf_counter() - started
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    memory = {
        key: int(status[name].split()[0]) / 1024 for key, name in (("own_mib", "RssAnon"), ("mapped_mib", "RssFile"))
    }
    print(json.dumps({"studies": len(data), "read_per_s": count / seconds, **memory}))


def reading(folder: Path, count: int) -> dict[str, Any]:
    """`read` in a process of its own."""
    code = f"from benchmarks.prepare import read; read({str(folder)!r}, {count})"
    done = subprocess.run([sys.executable, "-c", code], env=ALONE, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def consumed(folder: Path, work: Path, steps: int) -> float:
    """Studies a second that the demo model takes while training, on all cores; the median of the steps."""
    overrides = [f"run_dir={work / 'run'}", f"data.path={folder}", "data.studies=0", f"train.steps={steps}"]
    train = [sys.executable, str(ROOT / "train.py"), str(ROOT / "configs/train/demo.yaml"), *overrides]
    subprocess.run(train, cwd=ROOT, capture_output=True, check=True)
    lines = (work / "run" / "metrics.jsonl").read_text().splitlines()
    rates = sorted(float(found[1]) for line in lines if (found := re.search(r'"samples_per_s": ([\d.]+)', line)))
    return rates[len(rates) // 2]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run all three parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--studies", type=int, default=20_000)
    parser.add_argument("--shard-size", type=int, default=1000)
    parser.add_argument("--copies", type=int, default=10, help="times the dataset that reading is measured on")
    parser.add_argument("--steps", type=int, default=20, help="training steps that consumption is measured on")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills")
    parser.add_argument("--work", type=Path, default=Path("out/benchmark-prepare"), help="scratch folder, emptied")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    whole, torn, shared, large = (work / name for name in ("whole", "killed", "shared", "large"))
    size = (args.studies, args.shard_size)

    one = run(command(whole, *size))
    moments = killed(torn, *size, one, args.seed)
    two = run(command(shared, *size, "--shard", "0/2"), command(shared, *size, "--shard", "1/2"))
    enlarge(whole, large, args.copies)
    count = min(20_000, args.studies)
    small, big = reading(whole, count), reading(large, count)
    rate = consumed(whole, work, args.steps)
    figures = {
        "studies": args.studies,
        "shard_size": args.shard_size,
        "seconds": {"one process": one, "two processes": two},
        "two_processes_times_faster": one / two,
        "killed_after_s": moments,
        "killed_same_bytes": same(whole, torn),
        "shared_same_bytes": same(whole, shared),
        "reading": {"small": small, "large": big},
        "consumed_per_s": rate,
        "reading_times_consumption": small["read_per_s"] / rate,
    }
    shutil.rmtree(work)

    from benchmarks import report

    table = [
        ["embedded studies", f"{args.studies:,}"],
        ["prepared, one process, studies/s", f"{args.studies / one:.0f}"],
        ["two processes, times faster", f"{one / two:.2f}"],
        ["killed at s", ", ".join(f"{m:.0f}" for m in moments)],
        ["killed three times: the same bytes", str(figures["killed_same_bytes"])],
        ["two processes: the same bytes", str(figures["shared_same_bytes"])],
        *(
            [
                f"read of {r['studies']:,}: studies/s; MiB own + mapped",
                f"{r['read_per_s']:.0f}; {r['own_mib']:.0f} + {r['mapped_mib']:.0f}",
            ]
            for r in (small, big)
        ),
        ["consumed by the demo model, studies/s", f"{rate:.0f}"],
        ["read / consumed", f"{small['read_per_s'] / rate:.0f}"],
    ]
    print(report.table(table))
    words = sys.argv[1:] if argv is None else argv
    return report.finish("prepare", figures, argv=words, device="cpu", seed=args.seed, packages=("datasets", "pyarrow"))


if __name__ == "__main__":
    main()
