"""`medim search`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, pick_device, quiet
from medim.errors import UserError

HELP = """Find studies of a prepared dataset by a text or a picture.

  medim search runs/brain/final runs/data/brain --report "Axial section, upper third." --out out/hits
  medim search runs/brain/final runs/data/brain --image slice.png -n 3             # whose reports fit the picture
  medim search runs/brain/final runs/data/brain --split test --patient Colin27 --recall    # how often it is right

A text finds images, a picture finds reports. The model must have been trained with model.embed and objective.align.
Prints a line a study that is found, the nearest first; with --out, DIR/hits.jsonl and DIR/hits.png too. --recall prints
how often a study's image finds its own report first (among the first 5, 10), and its report its image."""


def search(argv: Sequence[str]) -> int:
    """`medim search MODEL DATA --report TEXT`."""
    parser = make_parser("medim search", HELP)
    parser.add_argument("model", help="a model folder")
    parser.add_argument("data", help="a folder of medim prepare, by the model's image tokenizer")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--report", help="a text that images are found for")
    query.add_argument("--image", type=Path, help="a picture that reports are found for")
    query.add_argument("--recall", action="store_true", help="how often the right one is found")
    parser.add_argument("--domain", help="of --image (default: the model's first)")
    parser.add_argument("-n", "--n", type=int, default=5, help="studies to find (5)")
    parser.add_argument("--split", default="", help="search only train, validation or test")
    parser.add_argument("--patient", action="append", default=[], help="search only this patient; several times")
    parser.add_argument("--out", type=Path, help="a new or empty folder for the hits and a sheet of them")
    parser.add_argument("--batch-size", type=int, default=32, help="changes the speed, not the hits (32)")
    parser.add_argument("--device", default=None)
    args = parser.parse_args(argv or ["--help"])
    for name in ("n", "batch_size"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: give at least 1")
    quiet()
    from tqdm import tqdm

    from medim.gallery import refuse_used, save_png, tiles
    from medim.pipeline import MeDiM
    from medim.search import Index, open_data

    if args.out:
        refuse_used(args.out)
    model = MeDiM.from_pretrained(args.model, pick_device(args.device))
    if args.report is not None:
        query_vector = model.embed(reports=[args.report])[0]
    elif args.image is not None:
        query_vector = model.embed(images=[args.image], domain=args.domain)[0]
    else:
        model.embeddings()
    data = open_data(args.data, model, args.split, args.patient)
    with tqdm(total=len(data), desc="embedding", unit="study", leave=False) as bar:
        index = Index(model, data, args.batch_size, bar.update)
    if args.recall:
        print(f"{len(index.kept)} studies; chance of recall@1: {index.chance:.4f}")
        for name, (value, low, high) in index.recall().items():
            print(f"{name:28}{value:.4f}  [{low:.4f}, {high:.4f}]  {value / index.chance:.1f} x chance of recall@1")
        return 0
    hits = index.search(query_vector, args.n, "images" if args.report is not None else "reports")
    for hit in hits:
        print(f"{hit.likeness:7.4f}  {hit.id}  {hit.report}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        lines = [{"id": hit.id, "likeness": round(hit.likeness, 6), "report": hit.report} for hit in hits]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (args.out / "hits.jsonl").write_text(text, encoding="utf-8")
        note = "Decoded from the codes of prepared studies."
        save_png(
            tiles([(f"{hit.id}  {hit.likeness:.3f}", hit.picture) for hit in hits]),
            args.out / "hits.png",
            synthetic=note,
        )
        print(f"sheet: {args.out / 'hits.png'}", file=sys.stderr)
    return 0
