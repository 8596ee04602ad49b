"""`medim push`."""

from __future__ import annotations

from collections.abc import Sequence

from medim.cli.common import make_parser, quiet

HELP = """Publish a model folder on the HuggingFace hub, with a card written from the run: data, tokenizers, config,
figures, limitations. Log in first: hf auth login. Then anyone names it as user/name, here and in Python.

  medim push runs/demo/final user/name --dry-run          # only show the card
  medim push runs/demo/final user/name --private --licence apache-2.0"""


def push(argv: Sequence[str]) -> int:
    """`medim push MODEL NAME`."""
    parser = make_parser("medim push", HELP)
    parser.add_argument("model", help="a model folder, or a folder of adapters")
    parser.add_argument("name", help="user/name on the hub")
    parser.add_argument("--run", metavar="DIR", help="the training run's folder (default: the one above MODEL)")
    parser.add_argument("--licence", default="", metavar="NAME", help="the hub's name of a licence, such as apache-2.0")
    parser.add_argument("--private", action="store_true", help="seen by you alone")
    parser.add_argument("--dry-run", action="store_true", help="print the card and upload nothing")
    args = parser.parse_args(argv or ["--help"])
    quiet()
    from medim.hub import model_card, push_to_hub

    if args.dry_run:
        print(model_card(args.model, args.name, run=args.run, licence=args.licence), end="")
        return 0
    print(push_to_hub(args.model, args.name, run=args.run, private=args.private, licence=args.licence))
    return 0
