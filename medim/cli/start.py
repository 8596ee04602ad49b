"""`medim init`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import described, make_parser, quiet
from medim.errors import UserError

HELP = """Make a model to train of a pretrained language model: its tokenizer and all its rows and layers stay, rows for
image codes and tags are added, its causal mask is removed, the diffusion time comes in by AdaLN, which changes
nothing yet.

  medim init HuggingFaceTB/SmolLM2-135M --image-tokenizer demo --out models/smollm2-start         # from the hub
  medim init models/llama-3.2-1b --image-tokenizer runs/vq/final --out models/llama-start          # a folder
  medim init models/smollm2.Q4_1.gguf --image-tokenizer demo --out models/smollm2-start            # a GGUF file
  python train.py CONFIG init=models/smollm2-start                                                 # then train it

BACKBONE is a decoder of the Llama, Mistral, Qwen 2, 2.5 and 3, Gemma 1, 2 and 3 (text), SmolLM, Phi-3, Chameleon or
Liquid families, or another with pre-norm layers: what comes out is compared with the backbone before it is written.

Settings (a.b=c):
{settings}"""


def init(argv: Sequence[str]) -> int:
    """`medim init BACKBONE --image-tokenizer NAME --out DIR [a.b=c ...]`."""
    quiet()
    from medim.start import BackboneStart, StartOptions

    told = "\n".join(f"  model.{name:12}{about}".replace("%%", "%") for name, about, _ in described(BackboneStart))
    told += "\n  slot.multiple, slot.longest   positions of a report's slot (16, 256)"
    parser = make_parser("medim init", HELP.format(settings=told))
    parser.add_argument("backbone", help="folder, hub name or GGUF file")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings")
    parser.add_argument("--image-tokenizer", required=True, metavar="NAME", help="folder of one, or demo")
    parser.add_argument("--out", required=True, metavar="DIR", help="the model folder to write")
    args = parser.parse_intermixed_args(argv or ["--help"])
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise UserError(f"--out {args.out}: is not an empty folder; name a new one")
    from medim.config import load
    from medim.loading import ASSETS
    from medim.start import start

    began = time.perf_counter()
    choice = load(None, args.overrides, StartOptions)
    name = args.image_tokenizer
    found = start(args.backbone, ASSETS / "demo" / "image_tokenizer" if name == "demo" else name, choice)
    for note in found.notes:
        print(f"note: {note}")
    found.model.save_pretrained(args.out)
    network, vocabulary = found.model.model, found.model.joint.vocabulary
    size = sum(p.numel() for p in network.parameters())
    print(
        f"{args.out}: {network.backbone.config.model_type}, {len(network.adaln)} layers, {size / 1e6:.1f}M parameters; "
        f"vocabulary {vocabulary.size}: text {vocabulary.text[1]}, image codes {vocabulary.image[0]} to "
        f"{vocabulary.image[1] - 1}, tags {min(vocabulary.tags.values())} to {max(vocabulary.tags.values())}"
    )
    print(
        f"its logits differ from the backbone's without causal mask by {found.difference:.1g} standard deviations; "
        f"{time.perf_counter() - began:.0f} s. Train it: python train.py CONFIG init={args.out}"
    )
    return 0
