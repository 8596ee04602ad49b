"""`medim score`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medim.cli.common import listed_path, make_parser, pick_device, quiet, read_lines
from medim.errors import UserError

if TYPE_CHECKING:
    from medim.data.studies import Image, Study
    from medim.pipeline import MeDiM

HELP = """Bits that a model needs for each study, and how well its image and its report fit each other.

  medim score demo --input studies.jsonl      # lines {"id": ..., "domain": "xray", "image": FILE, "report": TEXT}
  medim score demo --demo 16                  # embedded validation studies
  medim score demo --input studies.jsonl --given image               # the report alone, given its image
  medim score demo --task rank --input images.jsonl                  # lines {"image": FILE, "reports": [TEXT, ...]}

Prints a JSON line a study. Task bits: an upper bound of -log2 p(image, report) in all and by modality (--given: of the
other part given this one), standard errors, bits per token, and fit_bits: log2 p(report|image) - log2 p(report), in a
mean with log2 p(image|report) - log2 p(image) (--fit both). Above 0 the two belong together better than chance; fits of
different studies are comparable, bits are not. Task rank: the fit of each report with the image, all by the same masks,
the best one (counted from 0), and by how many bits it leads. A study's noise depends on its id and --seed only."""


def score(argv: Sequence[str]) -> int:
    """`medim score MODEL --input FILE.jsonl`."""
    parser = make_parser("medim score", HELP)
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("--base", metavar="DIR", help="of adapters: the model they were trained over, if it was moved")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="JSON lines of studies: id, domain, image, report (task rank: reports)")
    source.add_argument("--demo", type=int, metavar="N", help="N embedded validation studies")
    parser.add_argument("--task", choices=("bits", "rank"), default="bits", help="bits, or which report fits (bits)")
    parser.add_argument("--given", choices=("image", "report"), help="task bits: score the other part, given this one")
    parser.add_argument("--fit", choices=("both", "report", "image", "none"), default="both",
                        help="which directions the fit is estimated by; none leaves it out (both)")  # fmt: skip
    parser.add_argument("--n-times", type=int, help="noise levels (task bits 16, fits 8)")
    parser.add_argument("--batch-size", type=int, default=16, help="changes the speed, not the scores (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv or ["--help"])
    if args.task == "rank" and (args.given or args.demo is not None or args.fit == "none"):
        raise UserError("--task rank needs --input and a fit, and takes no --given")
    if args.demo is not None and args.demo < 1:
        raise UserError(f"--demo {args.demo}: give at least 1 study")
    quiet()
    from medim.pipeline import MeDiM

    model = MeDiM.from_pretrained(args.model, pick_device(args.device), args.base)
    (_rank if args.task == "rank" else _bits)(model, args)
    return 0


def _bits(model: MeDiM, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    studies = _studies(model, args)
    options = {"seed": args.seed, "batch_size": args.batch_size}
    roles = {"image": ("report",), "report": ("image",), None: ("report", "image")}[args.given]
    fitted = args.given is None and args.fit != "none"
    if fitted and not model.model.config.condition_dropout:
        print(f"{model.name}: trained without condition dropout: fit_bits are left out", file=sys.stderr)
        fitted = False
    with tqdm(total=len(studies) * (1 + fitted), desc="scoring", unit="study", leave=False) as bar:
        bounds = model.nll(
            studies, roles=roles, n_times=16 if args.n_times is None else args.n_times, progress=bar.update, **options
        )
        fits = None
        if fitted:
            fits = model.fit(
                studies,
                direction=args.fit,
                n_times=8 if args.n_times is None else args.n_times,
                progress=bar.update,
                **options,
            )
    for k, bound in enumerate(bounds):
        row: dict[str, Any] = {
            "id": bound.id,
            "bits": round(bound.total, 3),
            "standard_error": round(bound.total_error, 3),
        }
        if args.given:
            row["given"] = args.given
        for kind, bits in bound.bits.items():
            row |= {f"{kind}_bits": round(bits, 3), f"{kind}_standard_error": round(bound.standard_error[kind], 3),
                    f"{kind}_bits_per_token": round(bound.bits_per_token(kind), 4)}  # fmt: skip
        if fits is not None:
            row |= {"fit_bits": round(fits[k].bits, 3), "fit_standard_error": round(fits[k].standard_error, 3)}
        print(_json(row))


def _rank(model: MeDiM, args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from medim.data.studies import Study

    entries: list[tuple[str, Image, list[str]]] = []
    for name, image, line in _entries(model, args.input):
        reports = line.get("reports")
        if not isinstance(reports, list) or not all(isinstance(r, str) for r in reports):
            raise UserError(f"{args.input}: study {name}: needs reports, a list of texts, to be ranked")
        if len(reports) < 2:
            raise UserError(f"{args.input}: study {name}: {len(reports)} reports to rank: give at least 2")
        entries.append((name, image, reports))
    model.check([Study(name, name, (image,), report) for name, image, reports in entries for report in reports])
    options = {
        "direction": args.fit,
        "n_times": 8 if args.n_times is None else args.n_times,
        "seed": args.seed,
        "batch_size": args.batch_size,
    }
    with tqdm(total=len(entries), desc="ranking", unit="image", leave=False) as bar:
        for name, image, reports in entries:
            ranking = model.rank(image.pixels, reports, domain=image.modality, id=name, **options)
            row = {
                "id": name,
                "best": ranking.best,
                "best_report": reports[ranking.best],
                "margin_bits": round(ranking.margin, 3),
                "margin_standard_error": round(ranking.margin_error, 3),
                "fit_bits": [round(fit.bits, 3) for fit in ranking.fits],
                "fit_standard_error": [round(fit.standard_error, 3) for fit in ranking.fits],
            }
            bar.clear()
            print(_json(row), flush=True)
            bar.update()


def _studies(model: MeDiM, args: argparse.Namespace) -> list[Study]:
    from medim.data import embedded
    from medim.data.studies import Study

    if args.demo is not None:
        side = embedded.side_for(model.joint.image.config.resolution)
        return [make() for make in embedded.studies(args.demo, "validation", pixels=side)]
    studies = []
    for name, image, line in _entries(model, args.input):
        if not isinstance(line.get("report"), str) or not line["report"].strip():
            raise UserError(f"{args.input}: study {name}: needs a report to be scored")
        studies.append(Study(name, name, (image,), line["report"]))
    return studies


def _entries(model: MeDiM, listing: str) -> list[tuple[str, Image, dict[str, Any]]]:
    """Id, image and line of each study of a listing."""
    from medim.data.studies import Image

    entries = []
    for number, line in enumerate(read_lines(Path(listing))):
        name = str(line.get("id", f"{number:05d}"))
        if not isinstance(line.get("image"), str) or not line["image"]:
            raise UserError(f"{listing}: study {name}: needs an image to be scored")
        domain = str(line.get("domain", model.domains[0]))
        entries.append((name, Image(domain, listed_path(listing, line["image"])), line))
    return entries


def _json(row: dict[str, Any]) -> str:
    """One line; what is not a number (the standard error of one noise level) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return json.dumps({key: plain(value) for key, value in row.items()}, ensure_ascii=False)
