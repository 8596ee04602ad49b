"""Does synthetic data help? A report generator trained on real studies, and one on the same with synthetic ones added.

Called by `python -m eval.run eval/downstream.yaml`. Both generators start from the same random weights and take as many
steps of the same batch; they differ in what they are trained on alone. Each part of the work is kept, and a run that
was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import PIL.Image

from eval.bench import Bench
from eval.compare import compare, save_page, table
from eval.outputs import Output
from eval.protocol import Protocol
from eval.studies import read_studies
from medim.cli.preparation import prepare
from medim.cli.training import train
from medim.data.studies import Study
from medim.errors import UserError
from medim.pipeline import resolve
from medim.vocabulary import MODALITIES

ARMS = {"real": ("real",), "both": ("real", "synthetic")}


def synthesise(bench: Bench) -> dict[str, list[Output]]:
    """This process's share of the synthetic pairs, and in the first process all of them, by domain."""
    o = bench.protocol.downstream
    assert o is not None
    made = {}
    for domain, studies in _training(bench.protocol, o.synthetic).items():
        bench.say(f"{domain}: synthetic pairs")
        bench.sampler.make(domain, "pair", studies)
        if not bench.rank:
            made[domain] = bench.sampler.read(domain, "pair", studies)
    return made


def _training(protocol: Protocol, count: int) -> dict[str, list[Study]]:
    return read_studies(protocol, "train", count)


def run(bench: Bench, args: argparse.Namespace, made: dict[str, list[Output]]) -> dict[str, Any]:
    """Prepare, train, evaluate and compare both arms; returns what goes into results.json.

    Raises:
        UserError: training was asked to stop.
    """
    from eval.run import main

    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # the processes that sampled with this one have ended
        os.environ.pop(name, None)
    o, out = bench.protocol.downstream, bench.out
    assert o is not None
    model = resolve(args.model)
    rows: dict[str, list[dict[str, Any]]] = {"real": [], "synthetic": []}
    for domain, studies in _training(bench.protocol, o.real).items():
        gray = MODALITIES[domain].gray
        for study in studies:
            path = out / "data" / "real" / f"{domain}-{len(rows['real']):06d}.png"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                picture: PIL.Image.Image = bench.prepare(study, 0)
                picture.convert("L" if gray else "RGB").save(path)
            rows["real"].append(_row(path, domain, study.report, out))
        for output in made[domain]:
            if output.image is not None and output.report.strip():
                rows["synthetic"].append(_row(output.image, domain, output.report, out))
    for name, some in rows.items():
        listing = out / "data" / f"{name}.jsonl"
        listing.write_text("".join(json.dumps(row) + "\n" for row in some))
        tokenizers = [f"--{kind}-tokenizer={model / f'{kind}_tokenizer'}" for kind in ("image", "text")]
        if not (out / "prepared" / name / "index.json").is_file():
            prepare(["manifest", str(listing), "--out", str(out / "prepared" / name), *tokenizers])
    for arm, parts in ARMS.items():
        run_dir = out / "training" / arm
        paths = ",".join(str(out / "prepared" / part) for part in parts)
        settings = [f"run_dir={run_dir}", f"data.path=[{paths}]", f"text_tokenizer={model / 'text_tokenizer'}"]
        train([o.train, *settings, f"image_tokenizer={model / 'image_tokenizer'}", *o.overrides])
        if not (run_dir / "final").is_dir():
            raise UserError(f"{run_dir}: training was asked to stop; the same command goes on from there")
        seeds = f"seeds=[{','.join(map(str, bench.protocol.seeds))}]"
        given = [args.protocol, *args.overrides, "downstream=null", "tasks=[report]", seeds]
        limit = ["--limit", str(args.limit)] if args.limit else []
        if main([*given, "--model", str(run_dir / "final"), "--out", str(out / arm), *limit]):
            raise UserError(f"{out / arm}: the evaluation failed, see above")
    lines = compare(out / "real", out / "both", seed=bench.protocol.seeds[0], resamples=bench.protocol.bootstrap)
    save_page(out / "report.html", lines, out / "real", out / "both")
    print(table(lines, str(out / "real"), str(out / "both")))
    figures = {}
    for line in lines:
        change = line.difference / line.first if line.difference is not None and line.first else None
        figures[line.name] = vars(line) | {"difference": line.difference, "relative": change}
        if change is not None and "/bleu" in line.name:
            print(f"{line.name}: {change:+.1%} with synthetic studies")
    return {"studies": {name: len(some) for name, some in rows.items()}, "figures": figures}


def _row(image: Path, domain: str, report: str, out: Path) -> dict[str, Any]:
    relative = image.relative_to(out / "data") if image.is_relative_to(out / "data") else image.resolve()
    return {"id": image.stem, "image": str(relative), "report": report, "modality": domain, "split": "train"}
