"""Evaluate a model by a protocol: DIR/results.json, and DIR/report.html to look at.

python -m eval.run eval/demo.yaml --model runs/demo/final --out runs/demo/eval
python -m eval.run eval/demo.yaml --model demo --out out/eval --limit 4            # small, a CPU, half a minute
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import medim
from eval.protocol import Protocol
from medim.cli import run
from medim.config import load
from medim.errors import UserError

HELP = """Evaluate a model by a protocol.

  python -m eval.run eval/demo.yaml --model runs/demo/final --out runs/demo/eval
  python -m eval.run eval/demo.yaml --model demo --out out/eval --limit 4      # a small run
  python -m eval.run eval/demo.yaml --model demo --out out/eval-1 --seed 1     # other random numbers, same studies

Measures whether the images and the reports speak of the same findings, how the reports compare with real ones, how
well the image tokenizer keeps a picture, and how many bits the model needs for a token. Writes to DIR:
  report.html    the figures and samples, to look at: one file, open it in any browser
  results.json   the same figures and a row a sample
  samples/       the generated images and a manifest.jsonl for each task
A run that was stopped goes on where it was when the same command is given again."""
IDENTITY = "run.json"
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
    parser.add_argument("--model", required=True, help="a model folder, or `demo` for the shipped one")
    parser.add_argument("--out", required=True, help="folder of the results: new, empty, or of the same evaluation")
    parser.add_argument("--limit", type=int, help="at most so many studies a domain: a quick look")
    parser.add_argument("--seed", type=int, help="of the samples (default: the protocol's)")
    parser.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the samples (16)")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    for name, least in (("limit", 1), ("seed", 0), ("batch_size", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: give {least} or more")
    protocol = load(args.protocol, [], Protocol)
    evaluate(protocol, args)
    return 0


def evaluate(protocol: Protocol, args: argparse.Namespace) -> None:
    """Everything after the arguments are known to be right."""
    started = time.perf_counter()
    try:
        import torch
        from tqdm import tqdm
        from transformers.utils import logging

        from eval import measure, page
        from medim.pipeline import MeDiM, resolve
    except ModuleNotFoundError as error:
        raise UserError(f'{error.name} is not installed; python -m pip install -e ".[eval]"') from error
    logging.disable_progress_bar()
    seed = protocol.seed if args.seed is None else args.seed
    weights = fingerprint(resolve(args.model))
    identity = {
        "protocol": _plain(asdict(protocol)),
        "model_sha256": weights,
        "seed": seed,
        "limit": args.limit,
        "medim": medim.__version__,
    }
    out = claim(Path(args.out), identity)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = MeDiM.from_pretrained(args.model, device)
    unknown = [d for d in protocol.domains if d not in model.domains]
    if unknown:
        known = ", ".join(model.domains)
        raise UserError(f"{args.protocol}: {args.model} was not trained on {unknown[0]}; it knows {known}")

    studies, nll_studies = (min(n, args.limit or n) for n in (protocol.studies, protocol.likelihood.studies))
    total = studies * len(protocol.domains) * len(protocol.tasks)
    with tqdm(total=total, unit="sample", mininterval=0.5) as progress:
        bench = measure.Bench(model, protocol, out, studies, nll_studies, seed, args.batch_size, progress)
        domains = {domain: measure.evaluate_domain(bench, domain) for domain in protocol.domains}
    results: dict[str, Any] = {
        "model": args.model,
        "protocol_file": args.protocol,
        **identity,
        "device": device,
        "versions": {name: version(name) for name in PACKAGES} | {"medim": medim.__version__},
        "samples": total,
        "forward_passes": sum(t["forward_passes"] for d in domains.values() for t in d["tasks"].values()),
        "sampling_seconds": sum(t["seconds"] for d in domains.values() for t in d["tasks"].values()),
        "seconds": time.perf_counter() - started,
        "domains": domains,
    }
    plain = _plain(results)
    _write(out / "results.json", json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(out / "report.html", page.render(plain, out))
    print(table(plain))
    print(f"\nresults: {out / 'results.json'}\nreport:  {out / 'report.html'}")


def claim(out: Path, identity: dict[str, Any]) -> Path:
    """The output folder, made if need be and marked with `identity`.

    Raises:
        UserError: it cannot be made, or holds something else than this very evaluation.
    """
    mark = out / IDENTITY
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made ({error.strerror}); give another --out") from error
    if not any(out.iterdir()):
        _write(mark, json.dumps(identity, indent=1) + "\n")
        return out
    if not mark.is_file():
        raise UserError(f"{out}: holds other files already; give another --out (nothing was overwritten)")
    earlier = json.loads(mark.read_text(encoding="utf-8"))
    differing = [key for key in identity if earlier.get(key) != identity[key]]
    if differing:
        what = ", ".join(differing)
        raise UserError(f"{out}: holds an evaluation with another {what}; give another --out or remove it")
    return out


def fingerprint(folder: Path) -> str:
    """SHA-256 over the names and contents of a model folder's files."""
    whole = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return whole.hexdigest()


def table(results: dict[str, Any]) -> str:
    """The main figures as text: coherence by domain and task, and a line a domain on tokenizer and likelihood."""
    lines = [f"{'domain':<11}{'task':<8}{'F1':>6}  {'95% interval':<16}{'floor':>6}{'ceiling':>9}"]
    for domain, figures in results["domains"].items():
        for task, found in figures["tasks"].items():
            c = found["coherence"]
            interval = f"[{_figure(c['interval'][0])}, {_figure(c['interval'][1])}]"
            lines.append(
                f"{domain:<11}{task:<8}{_figure(c['f1']):>6}  {interval:<16}"
                f"{_figure(c['floor']):>6}{_figure(c['ceiling']):>9}"
            )
    for domain, figures in results["domains"].items():
        tokenizer, nll = figures["tokenizer"], figures["nll"]
        bits = [
            f"{kind} {_figure(nll[kind]['bits_per_token'])} ± {_figure(nll[kind]['standard_error'])}"
            for kind in ("text", "image")
            if kind in nll
        ]
        lines.append(
            f"{domain}: tokenizer {_figure(tokenizer['psnr'], 1)} dB, SSIM {_figure(tokenizer['ssim'])}"
            + (f"; bits per token: {', '.join(bits)}" if bits else "")
        )
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


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    aside = path.with_name(path.name + ".partial")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


if __name__ == "__main__":
    raise SystemExit(main())
