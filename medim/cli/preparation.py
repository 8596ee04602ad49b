"""`medim prepare`."""

from __future__ import annotations

from collections.abc import Sequence

from medim.cli.common import make_parser, quiet
from medim.errors import UserError

HELP = """Encode studies once, so that training never waits for pixels.

  medim prepare demo --studies 6000 --out runs/data/demo      # the embedded X-ray phantom and H&E tiles

An interrupted run goes on where it stopped when the same command is run again."""


def prepare(argv: Sequence[str]) -> int:
    """`medim prepare SOURCE [ROOT] --out DIR`."""
    parser = make_parser("medim prepare", HELP)
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
    quiet()
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
