"""`medim score`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import listed_path, make_parser, pick_device, quiet, read_lines
from medim.errors import UserError

HELP = """Bits that a model needs for each study, by modality: an upper bound of -log2 p.

  medim score demo --input studies.jsonl      # lines {"id": ..., "domain": "xray", "image": FILE, "report": TEXT}
  medim score demo --demo 16                  # embedded validation studies

Prints a JSON line a study: bits, their standard error and bits per token, by modality."""


def score(argv: Sequence[str]) -> int:
    """`medim score MODEL --input FILE.jsonl`."""
    parser = make_parser("medim score", HELP)
    parser.add_argument("model", help="a model folder, or demo")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", help="JSON lines of studies: id, domain, image, report")
    source.add_argument("--demo", type=int, metavar="N", help="N embedded validation studies")
    parser.add_argument("--n-times", type=int, default=16, help="noise levels a study (16)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv or ["--help"])
    quiet()
    from medim.data import embedded
    from medim.data.studies import Image, Study
    from medim.pipeline import MeDiM

    model = MeDiM.from_pretrained(args.model, pick_device(args.device))
    if args.demo is not None:
        studies = list(embedded.studies(args.demo, "validation"))
    else:
        studies = []
        for number, line in enumerate(read_lines(Path(args.input))):
            name = str(line.get("id", f"{number:05d}"))
            if not line.get("image") or not line.get("report"):
                raise UserError(f"{args.input}: study {name}: needs an image and a report to be scored")
            domain = str(line.get("domain", model.domains[0]))
            picture = Image(domain, listed_path(args.input, line["image"]))
            studies.append(Study(name, name, (picture,), str(line["report"])))
    for result in model.nll(studies, n_times=args.n_times, seed=args.seed):
        row: dict[str, str | float] = {"id": result.id}
        for kind, bits in result.bits.items():
            row |= {f"{kind}_bits": round(bits, 3), f"{kind}_standard_error": round(result.standard_error[kind], 3),
                    f"{kind}_bits_per_token": round(result.bits_per_token(kind), 4)}  # fmt: skip
        print(json.dumps(row))
    return 0
