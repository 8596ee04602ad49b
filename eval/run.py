"""Evaluate a model, or anybody's outputs, by a protocol: DIR/results.json, and DIR/report.html to look at.

python -m eval.run eval/demo.yaml --model runs/demo/final --out runs/demo/eval
python -m eval.run eval/demo.yaml --model demo --out out/eval --limit 4            # small, a CPU, half a minute
python -m eval.run eval/pathgen_report.yaml data.root=ROOT --predictions DIR --out out/theirs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import medim
from eval.protocol import DataOptions, Protocol
from eval.studies import REFERENCES
from medim.cli import run
from medim.config import load
from medim.errors import UserError

HELP = """Evaluate a model, or the outputs of any system, by a protocol.

  python -m eval.run eval/demo.yaml --model runs/demo/final --out runs/demo/eval
  python -m eval.run eval/demo.yaml --model demo --out out/eval --limit 4      # a small run
  python -m eval.run eval/mimic_cxr_report.yaml data.root=/data/mimic-cxr-jpg --model M --out DIR --processes 8
  python -m eval.run eval/pathgen_report.yaml data.root=/data/pathgen --predictions THEIRS --out DIR
  python -m eval.run eval/pathgen_report.yaml --predictions THEIRS --references GT --out DIR

Any setting of the protocol can be changed: a.b=c. THEIRS is a folder of image_KEY.png and text_KEY.txt, KEY being the
study or its number in the protocol's order from 0, or a manifest.jsonl as sample.py writes it. Missing, empty and
broken outputs are counted and score zero. Writes to DIR:
  report.html    the figures and samples, to look at: one file, open it in any browser
  results.json   the same figures, with intervals, and a row an output
  scores.npz     what each output adds to each figure: python -m eval.compare DIR OTHER
  samples/       the generated images and a manifest.jsonl for each task
A run that was stopped goes on where it was when the same command is given again."""
IDENTITY = "run.json"
GT = ("gt", "gt_dir", "real", "references")  # folders of real outputs beside others' own
PACKAGES = ("torch", "transformers", "sacrebleu", "rouge-score", "scikit-image")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code, 2 for a mistake of the user."""
    return run(_main, argv)


def _main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("protocol", help="a YAML file such as eval/demo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the protocol's")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--model", help="a model folder, or `demo` for the shipped one")
    who.add_argument("--predictions", type=Path, metavar="DIR", help="outputs of any system")
    real = (
        "text_KEY.txt, image_KEY.png that are real, instead of the protocol's data (default: DIR/gt of --predictions)"
    )
    parser.add_argument("--references", type=Path, metavar="DIR", help=real)
    parser.add_argument("--out", help="folder of the results, new or of the same evaluation (runs/eval/PROTOCOL-NAME)")
    parser.add_argument("--limit", type=int, help="at most so many studies a domain: a quick look")
    parser.add_argument("--seed", type=int, help="of the samples (default: the protocol's)")
    parser.add_argument("--processes", type=int, default=1, help="that sample side by side, on a GPU each (1)")
    parser.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the samples (16)")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_intermixed_args(argv)
    for name, least in (("limit", 1), ("seed", 0), ("batch_size", 1), ("processes", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    protocol = load(args.protocol, args.overrides, Protocol)
    if args.seed is not None:
        protocol = replace(protocol, seeds=(args.seed,))
    if args.predictions and not args.references and not protocol.data.root:
        args.references = next((one for name in GT if (one := args.predictions / name).is_dir()), None)
    if args.references:
        if args.model:
            raise UserError("--references goes with --predictions; a model is given studies: data.source, data.root")
        protocol = replace(protocol, data=DataOptions(REFERENCES, str(args.references)))
    if not protocol.seeds:
        raise UserError("seeds: give one at least")
    args.out = Path(args.out or _default_out(args))
    with _others(argv, args.processes) as args.check:
        evaluate(protocol, args)
    return 0


def _default_out(args: argparse.Namespace) -> str:
    name = (args.model or str(args.predictions)).rstrip("/").replace("/", "-")
    return f"runs/eval/{Path(args.protocol).stem}-{name}"


@contextmanager
def _others(argv: Sequence[str], processes: int) -> Iterator[Callable[[], None]]:
    """The other processes of ``--processes``: this very command, told their ranks as a launcher would tell them.

    Gives what raises once one of them has failed.
    """
    if processes == 1 or "RANK" in os.environ:
        yield lambda: None
        return
    command = [sys.executable, "-m", "eval.run", *argv]
    started = []
    for rank in range(1, processes):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
        started.append(subprocess.Popen(command, env={**os.environ, **ranks}, stdout=subprocess.DEVNULL))
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(processes)}

    def check() -> None:
        for rank, process in enumerate(started, start=1):
            if process.poll():
                raise UserError(f"process {rank} of {processes} failed; the same command goes on from what is there")

    try:
        yield check
    finally:
        for process in started:
            process.terminate()
            process.wait()
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)


def evaluate(protocol: Protocol, args: argparse.Namespace) -> None:
    """Everything after the arguments are known to be right."""
    started = time.perf_counter()
    try:
        from eval import bench, page
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed; python -m pip install -e ".[eval]"') from error
    made = bench.evaluate(protocol, args, claim)
    if made is None:  # another process scores
        return
    results, sums = made
    if protocol.downstream:
        whole = json.dumps(_plain(results | {"model": args.model}), indent=1, allow_nan=False)
        write(args.out / "results.json", whole + "\n")
        print(f"\nresults: {args.out / 'results.json'}\nreport:  {args.out / 'report.html'}")
        return
    results = {
        "model": args.model or str(args.predictions),
        "protocol_file": args.protocol,
        **results,
        "versions": {name: found for name in PACKAGES if (found := _version(name))} | {"medim": medim.__version__},
        "seconds": time.perf_counter() - started,
    }
    plain = _plain(results)
    bench.save_sums(args.out / "scores.npz", sums)
    write(args.out / "results.json", json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    write(args.out / "report.html", page.render(plain, args.out))
    print(table(plain))
    for name, why in plain["not_measured"].items():
        print(f"not measured: {name}: {why}", file=sys.stderr)
    print(f"\nresults: {args.out / 'results.json'}\nreport:  {args.out / 'report.html'}")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def claim(out: Path, identity: dict[str, Any], lead: bool = True) -> None:
    """Make the output folder if need be and mark it with `identity`; processes but the lead wait for the mark.

    Raises:
        UserError: it cannot be made, or holds something else than this very evaluation.
    """
    mark = out / IDENTITY
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    identity = json.loads(json.dumps(identity, default=str))
    if lead and not any(out.iterdir()):
        write(mark, json.dumps(identity, indent=1) + "\n")
        return
    for _ in range(0 if lead else 600):
        if not mark.is_file():
            time.sleep(0.1)
    if not mark.is_file():
        raise UserError(f"{out}: holds other files already; give another --out (nothing was overwritten)")
    earlier = json.loads(mark.read_text(encoding="utf-8"))
    differing = [key for key in identity if earlier.get(key) != identity[key]]
    if differing:
        what = ", ".join(differing)
        raise UserError(f"{out}: holds an evaluation with another {what}; give another --out or remove it")


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def table(results: dict[str, Any]) -> str:
    """The figures as text: a line each, with interval, floor and ceiling, and what others are said to reach."""
    rows = []
    for domain, found in results["domains"].items():
        for task, one in found["tasks"].items():
            rows += [(domain, task, name, figure) for name, figure in one["figures"].items()]
        kept = found.get("memorisation", {}).items()
        rows += [(domain, "all", name, figure) for name, figure in kept if isinstance(figure, dict)]
    width = max((len(name) for _, _, name, _ in rows), default=6)
    head = f"{'domain':<11}{'task':<10}{'figure':<{width}}{'value':>9}"
    lines = [f"{head}  {'95% interval':<18}{'floor':>7}{'ceiling':>9}"]
    for domain, task, name, figure in rows:
        low, high = figure.get("low"), figure.get("high")
        interval = f"[{_figure(low)}, {_figure(high)}]" if low is not None else ""
        ends = f"{_figure(figure.get('floor')):>7}{_figure(figure.get('ceiling')):>9}"
        shown = f"{_figure(figure['value']):>9}  {interval:<18}{ends}"
        lines.append(f"{domain:<11}{task:<10}{name:<{width}}{shown}")
    for domain, found in results["domains"].items():
        said = []
        if tokenizer := found.get("tokenizer"):
            said.append(f"tokenizer {_figure(tokenizer['psnr'], 1)} dB, SSIM {_figure(tokenizer['ssim'])}")
        bits = [
            f"{kind} {_figure(one['bits_per_token'])} ± {_figure(one['standard_error'])}"
            for kind, one in found.get("nll", {}).items()
            if isinstance(one, dict)
        ]
        said += [f"bits per token: {', '.join(bits)}"] if bits else []
        if rank := found.get("rank"):
            accuracy, chance = _figure(rank["accuracy"]), _figure(rank["chance"])
            said.append(f"right report found by likelihood: {accuracy} of {rank['n']} (chance {chance})")
        if said:
            lines.append(f"{domain}: {'; '.join(said)}")
    for one in results["protocol"]["published"]:
        figures = ", ".join(f"{name} {value:g}" for name, value in one["figures"].items())
        lines.append(f"published: {one['system']}: {figures} ({one['source']})")
    return "\n".join(lines)


def _figure(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _plain(value: Any) -> Any:
    """JSON data: lists for tuples, null for figures that are undefined."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
