"""`medim inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, quiet
from medim.errors import UserError

HELP = """What is in a prepared dataset, and what is wrong with it.

  medim inspect runs/data/demo                     # a summary here, and the page runs/data/demo/inspect.html
  medim inspect DIR --seed 1 --out page.html       # other random studies; page.html and page.json

Counts by split, modality and view; report lengths; use of the codebook; random studies as they were and as their codes
decode; skipped files with reasons; pictures and reports that occur in several studies; patients in two splits.

Two pictures are near when their perceptual fingerprints differ in at most --radius of 256 bits. 10 finds copies that
were re-encoded, resized or brightened; unlike pictures of one kind can come within 16. Larger radii take much longer.

Exit code 1: a patient stands in two splits, and --allow-shared-patients is not given. The page is written all the same.
It holds pictures and reports of the data: keep it where the data may be kept."""

RADII = range(65)


def inspect(argv: Sequence[str]) -> int:
    """`medim inspect DIR`."""
    parser = make_parser("medim inspect", HELP)
    parser.add_argument("folder", metavar="DIR", help="what `medim prepare` wrote")
    parser.add_argument("--out", help="the page (DIR/inspect.html); figures go beside it, with the suffix .json")
    parser.add_argument("--studies", type=int, default=24, help="how many are shown (24)")
    parser.add_argument("--seed", type=int, default=0, help="which are shown (0)")
    parser.add_argument("--radius", type=int, default=10, help="bits in which near pictures may differ (10)")
    parser.add_argument("--allow-shared-patients", action="store_true", help="patients in two splits are no error")
    args = parser.parse_args(argv or ["--help"])
    for name, value, allowed in (
        ("--studies", args.studies, range(1001)),
        ("--radius", args.radius, RADII),
        ("--seed", args.seed, range(2**63)),
    ):
        if value not in allowed:
            raise UserError(f"{name} {value}: give 0 to {allowed[-1]}")
    out = Path(args.out or Path(args.folder) / "inspect.html")
    if out.suffix != ".html" or not out.parent.is_dir():
        raise UserError(f"--out {out}: give a name that ends in .html, in a folder that is there")
    quiet()
    from medim.data.inspect import Prepared, gather, summary
    from medim.data.page import problems, render, samples, text
    from medim.data.prepare import codebook_hash
    from medim.tokenization.image import VQTokenizer

    data = Prepared.open(args.folder)
    tokenizer = VQTokenizer.from_pretrained(data.folder / "image_tokenizer")
    if data.index.get("image_tokenizer") != codebook_hash(tokenizer):
        raise UserError(f"{args.folder}/image_tokenizer: not the one that made the dataset; put back the one that did")
    columns = gather(data.batches(), tokenizer.codebook_size)
    found = summary(data, columns, args.radius)
    wrong = problems(found, args.allow_shared_patients)
    shown = samples(data, columns, tokenizer, args.studies, args.seed)
    out.write_text(render(found, wrong, shown, args.folder), encoding="utf-8")
    out.with_suffix(".json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(text(found, wrong))
    print(f"\npage: {out}\nfigures: {out.with_suffix('.json')}")
    errors = [problem for problem in wrong if problem.error]
    for problem in errors:
        print(f"error: {args.folder}: {problem.what}: {problem.do}", file=sys.stderr)
    return 1 if errors else 0
