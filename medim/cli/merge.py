"""`medim merge`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, quiet
from medim.errors import UserError

HELP = """Merge adapters into the model that they were trained over, as a model folder that needs neither.

  medim merge runs/lora/final --out runs/merged
  medim merge runs/lora/final --base /models/llama --out runs/merged --dtype bf16   # the base was moved

Adapters load without this too, wherever a model is named; merged, the model can be trained further (init: DIR)."""


def merge(argv: Sequence[str]) -> int:
    """`medim merge ADAPTER --out DIR`."""
    parser = make_parser("medim merge", HELP)
    parser.add_argument("adapter", help="the final folder of a run with lora.rank, or a checkpoint's model folder")
    parser.add_argument("--base", metavar="DIR", help="the model that they were trained over, if it was moved")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the merged model goes")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of its weights (fp32)")
    args = parser.parse_args(argv or ["--help"])
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise UserError(f"--out {args.out}: is not an empty folder; name a new one")
    quiet()
    import torch

    from medim.model.adapters import is_adapters, read_settings
    from medim.pipeline import MeDiM, resolve

    folder = resolve(args.adapter)
    if not is_adapters(folder):
        raise UserError(f"{args.adapter}: a whole model, not adapters: there is nothing to merge")
    model = MeDiM.from_pretrained(folder, base=args.base)
    if args.dtype == "bf16":
        model.model.to(torch.bfloat16)
    model.save_pretrained(args.out)
    print(f"{args.out}: {args.adapter} over {args.base or read_settings(folder).base}, {args.dtype}")
    return 0
