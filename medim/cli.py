"""The `medim` command, and what `train.py` and `sample.py` call. Heavy imports come after the arguments are read."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from medim.errors import UserError

TRAIN_HELP = """Train a model, or go on with a run that was stopped.

  python train.py configs/train/demo.yaml                              # goes on from the shipped demo checkpoint
  python train.py configs/train/demo.yaml train.steps=40 run_dir=R     # any setting can be changed: a.b=c
  accelerate launch --num_processes 8 train.py CONFIG                  # several GPUs

Run the same command again to resume after the last complete checkpoint. RUN_DIR/final is the trained model.
RUN_DIR/metrics.jsonl has a line a step: loss by modality and by noise level, samples/s, memory."""

SAMPLE_HELP = """Make image-report pairs, reports for images, or images for reports. All output is synthetic.

  python sample.py demo --task pair -n 4 --out out/pairs                         # both at once
  python sample.py demo --task report --image chest.png --out out/report         # image -> report
  python sample.py demo --task image --report "Large left pneumothorax." -n 4 --out out/image
  python sample.py demo --task report --input studies.jsonl --out out/many       # a line a study: {"image": ...}

MODEL is a folder that train.py wrote, or `demo`: the small model that comes with this package.
Writes OUT/manifest.jsonl (a line a sample), OUT/images/*.png and OUT/contact_sheet.png."""

PREPARE_HELP = """Encode studies once, so that training never waits for pixels.

  medim prepare demo --studies 6000 --out runs/data/demo      # the embedded X-ray phantom and H&E tiles

An interrupted run goes on where it stopped when the same command is run again."""

SCORE_HELP = """Bits that a model needs for each study, by modality: an upper bound of -log2 p.

  medim score demo --input studies.jsonl      # lines {"id": ..., "domain": "xray", "image": FILE, "report": TEXT}
  medim score demo --demo 16                  # embedded validation studies

Prints a JSON line a study: bits, their standard error and bits per token, by modality."""


def _parser(prog: str, description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def run(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command as a user meets it: a mistake is one line on stderr and exit code 2."""
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        return 2
    except ImportError as error:  # an optional package: its message says what to install
        print(f"error: {error}; see README.md on how to install", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _quiet() -> None:
    """Libraries keep to warnings: their own progress bars would hide ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


# ----------------------------------------------------------------------------------------------------------- train


def train(argv: Sequence[str]) -> int:
    """`train.py CONFIG [a.b=c ...]`."""
    parser = _parser("train.py", TRAIN_HELP)
    parser.add_argument("config", help="a YAML file, as those in configs/train/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    from medim.config import dump, load
    from medim.recipe import TrainConfig, make_task

    config = load(args.config, args.overrides, TrainConfig)
    _quiet()
    from accelerate import PartialState

    from medim.training.loop import train as run_loop

    with PartialState().main_process_first():  # one process encodes the data, the others find it there
        task = make_task(config)
    final = run_loop(task, config.train, Path(config.run_dir), dump(config))
    print(f"model: {final}")
    return 0


# ---------------------------------------------------------------------------------------------------------- sample


def sample(argv: Sequence[str]) -> int:
    """`sample.py MODEL --task TASK --out DIR`."""
    parser = _parser("sample.py", SAMPLE_HELP)
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--task", default="pair", help="pair, report or image (default pair)")
    parser.add_argument("--out", required=True, help="a new or empty folder")
    parser.add_argument("-n", "--n", type=int, default=8, help="samples to make, for each line of --input if given (8)")
    parser.add_argument("--domain", help="xray, pathology, or xray,pathology to alternate (default: the model's first)")
    parser.add_argument("--seed", type=int, default=0, help="sample i depends on the seed and i only (0)")
    parser.add_argument("--image", help="task report: the image file to write about")
    parser.add_argument("--report", help="task image: the report to draw")
    parser.add_argument("--input", help="JSON lines of studies: id, domain, image, report")
    parser.add_argument("--plan", help="ancestral or confidence (default: what the model recommends)")
    parser.add_argument("--steps", type=int, help="forward passes at most, a segment")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale; 0 is off")
    parser.add_argument("--temperature", type=float, help="1 samples, 0 takes the most probable")
    parser.add_argument("--order", choices=("report-first", "image-first", "together"), help="how a pair is made")
    parser.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the samples (16)")
    parser.add_argument("--device", default=None, help="cpu, cuda, ... (default: cuda if there is one)")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    if args.n < 1:
        raise UserError(f"-n {args.n}: give at least 1 sample to make")
    _quiet()
    from dataclasses import replace

    from tqdm import tqdm

    from medim.gallery import Gallery, refuse_used
    from medim.pipeline import TASKS, MeDiM

    if args.task not in TASKS:
        raise UserError(f"--task {args.task}: unknown task; one of {', '.join(TASKS)}")
    model = MeDiM.from_pretrained(args.model, _device(args.device))
    sampling = model.sampling.override(args.plan, args.steps, args.guidance, args.temperature)
    if args.order:
        sampling = replace(sampling, order=args.order)
    requests = _requests(args, model.domains)
    refuse_used(args.out)
    made = model.generate(args.task, requests, batch_size=args.batch_size, sampling=sampling)
    with tqdm(total=len(requests), desc="sampling", unit="sample") as bar:
        first = next(made)  # a mistake in a request shows before the folder is made
        gallery = Gallery(args.out, args.model)
        for one in itertools.chain((first,), made):
            gallery.add(one, args.seed)
            bar.update()
    print(f"manifest:      {gallery.root / 'manifest.jsonl'}")
    print(f"contact sheet: {gallery.close()}")
    return 0


def _device(name: str | None) -> str:
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {chosen}: not usable here ({str(error).splitlines()[0]})") from error
    return chosen


def _requests(args: argparse.Namespace, known: Sequence[str]) -> list[Any]:
    from medim.pipeline import Request

    domains = args.domain.split(",") if args.domain else [known[0]]
    if args.input:
        if args.image or args.report:
            raise UserError("--input names images and reports itself: leave --image and --report out")
        lines = _read_lines(Path(args.input))
        given = [
            (str(line.get("id", f"{number:05d}")), str(line.get("domain", domains[0])), line)
            for number, line in enumerate(lines)
        ]
        wanted = {"pair": (), "report": ("image",), "image": ("report",)}[args.task]
        return [
            Request(
                f"{name}-{k:03d}" if args.n > 1 else name,
                domain,
                (args.seed, number, k),
                _path(args.input, line["image"]) if "image" in wanted and line.get("image") else None,
                line.get("report") if "report" in wanted else None,
            )
            for number, (name, domain, line) in enumerate(given)
            for k in range(args.n)
        ]
    return [
        Request(
            f"{domains[i % len(domains)]}-{args.task}-{i:05d}",
            domains[i % len(domains)],
            (args.seed, i),
            Path(args.image) if args.image else None,
            args.report,
        )
        for i in range(args.n)
    ]


def _path(listing: str, name: str) -> Path:
    """A file named in a listing: relative to the listing, or to here."""
    beside = Path(listing).parent / name
    return beside if beside.exists() else Path(name)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f'{path}:{number}: a JSON object is wanted, such as {{"image": "a.png"}}')
        lines.append(value)
    if not lines:
        raise UserError(f"{path}: holds no studies")
    return lines


# -------------------------------------------------------------------------------------------------- prepare, score


def prepare(argv: Sequence[str]) -> int:
    """`medim prepare SOURCE [ROOT] --out DIR`."""
    parser = _parser("medim prepare", PREPARE_HELP)
    parser.add_argument("source", choices=("demo",), help="demo: the embedded studies")
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--studies", type=int, default=6000, help="how many (6000)")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lungs", choices=("ellipse", "real"), default="ellipse", help="X-ray outlines; real: from torchxrayvision"
    )
    parser.add_argument("--image-tokenizer", default=None, help="folder of a VQ tokenizer (default: the shipped one)")
    args = parser.parse_args(argv or ["--help"])
    if args.studies < 1:
        raise UserError(f"--studies {args.studies}: give at least 1")
    _quiet()
    from medim.data import embedded
    from medim.data.prepare import prepare as write
    from medim.pipeline import ASSETS
    from medim.tokenization.image import VQTokenizer

    tokenizer = VQTokenizer.from_pretrained(args.image_tokenizer or ASSETS / "demo" / "image_tokenizer")
    data = write(
        lambda start: embedded.studies(args.studies, args.split, args.seed, args.lungs, start),
        tokenizer,
        args.out,
        total=args.studies,
    )
    print(f"{len(data)} studies: {args.out}")
    return 0


def score(argv: Sequence[str]) -> int:
    """`medim score MODEL --input FILE.jsonl`."""
    parser = _parser("medim score", SCORE_HELP)
    parser.add_argument("model", help="a model folder, or demo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="JSON lines of studies: id, domain, image, report")
    source.add_argument("--demo", type=int, metavar="N", help="N embedded validation studies")
    parser.add_argument("--n-times", type=int, default=16, help="noise levels a study (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv or ["--help"])
    _quiet()
    from medim.data import embedded
    from medim.data.studies import Image, Study
    from medim.pipeline import MeDiM

    model = MeDiM.from_pretrained(args.model, _device(args.device))
    if args.demo is not None:
        studies = list(embedded.studies(args.demo, "validation"))
    else:
        studies = []
        for number, line in enumerate(_read_lines(Path(args.input))):
            name = str(line.get("id", f"{number:05d}"))
            if not line.get("image") or not line.get("report"):
                raise UserError(f"{args.input}: study {name}: needs an image and a report to be scored")
            domain = str(line.get("domain", model.domains[0]))
            picture = Image(domain, _path(args.input, line["image"]))
            studies.append(Study(name, name, (picture,), str(line["report"])))
    for result in model.nll(studies, n_times=args.n_times, seed=args.seed):
        row: dict[str, str | float] = {"id": result.id}
        for kind, bits in result.bits.items():
            row |= {f"{kind}_bits": round(bits, 3), f"{kind}_standard_error": round(result.standard_error[kind], 3),
                    f"{kind}_bits_per_token": round(result.bits_per_token(kind), 4)}  # fmt: skip
        print(json.dumps(row))
    return 0


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], int], str]] = {
    "train": (train, "train a model, or go on with a run"),
    "sample": (sample, "make pairs, reports or images"),
    "prepare": (prepare, "encode studies once, before training"),
    "score": (score, "bits that a model needs for each study"),
}


def _medim(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print("medim COMMAND ...: unified generation of medical images and reports\n")
        print("\n".join(f"  medim {name:9}{text}" for name, (_, text) in COMMANDS.items()))
        print("\n`medim COMMAND --help` teaches one. Benchmarks: python -m eval.run --help")
        return 0
    if argv[0] not in COMMANDS:
        raise UserError(f"medim {argv[0]}: unknown command; one of {', '.join(COMMANDS)}")
    return COMMANDS[argv[0]][0](argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """The console script."""
    return run(_medim, argv)
