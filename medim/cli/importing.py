"""`medim import`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, quiet
from medim.errors import UserError

HELP = """Make folders that this package loads of checkpoints that others published. Of a pickle only tensors are read.

  medim import medim-official model.safetensors --vqgan vqgan.ckpt --vqgan-config vqgan.yaml --text-tokenizer \\
        Llama-2-7b-hf --out models/medim-official      # the authors' checkpoint, with the same logits
  medim import vqgan vqgan.ckpt --config vqgan.yaml --out models/chameleon-vq    # taming's or Chameleon's VQGAN
  medim import weights DIR --out DIR2                                            # a HuggingFace folder of pickles"""


def import_(argv: Sequence[str]) -> int:
    """`medim import WHAT CHECKPOINT --out DIR`."""
    parser = make_parser("medim import", HELP)
    parser.add_argument("what", choices=("medim-official", "vqgan", "weights"))
    parser.add_argument("checkpoint", help="the file, or its folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument("--config", metavar="YAML", help="vqgan: the file that came with the checkpoint")
    group = parser.add_argument_group("medim-official")
    group.add_argument("--vqgan", metavar="CKPT", help="Chameleon's vqgan.ckpt, or a folder of `medim import vqgan`")
    group.add_argument("--vqgan-config", metavar="YAML", help="the vqgan.yaml that came with it")
    group.add_argument("--text-tokenizer", metavar="DIR", help="Llama-2's tokenizer folder")
    group.add_argument("--backbone-config", metavar="JSON", help="Liquid's config.json (default: Gemma's settings)")
    group.add_argument("--size", default="512x512", metavar="WxH", help="pixels that each canvas states (512x512)")
    args = parser.parse_args(argv or ["--help"])
    if Path(args.out).exists() and (not Path(args.out).is_dir() or any(Path(args.out).iterdir())):
        raise UserError(f"--out {args.out}: is not an empty folder; name a new one")
    quiet()
    if args.what == "weights":
        from medim.official import convert_weights

        names = convert_weights(args.checkpoint, args.out)
        print(f"{args.out}: {', '.join(names)} as safetensors")
    elif args.what == "vqgan":
        print(f"{args.out}: {_vqgan(args.checkpoint, args.config, '--config', args.out)}")
    else:
        _official(args)
    return 0


def _vqgan(checkpoint: str, config: str | None, option: str, out: str) -> str:
    from medim.tokenization.image import VQTokenizer

    if config is None:
        raise UserError(f"{option}: give the yaml that came with {checkpoint}")
    image = VQTokenizer.from_taming(checkpoint, config)
    image.save_pretrained(out, {"origin": f"{Path(checkpoint).name} with {Path(config).name}"})
    return f"K {image.codebook_size}, {image.config.resolution} px, f {image.downsampling}"


def _official(args: argparse.Namespace) -> None:
    from medim.official import import_official
    from medim.tokenization.image import VQTokenizer

    for option in ("vqgan", "text_tokenizer"):
        if getattr(args, option) is None:
            raise UserError(f"--{option.replace('_', '-')}: is needed for medim-official")
    width, cross, height = args.size.partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UserError(f"--size {args.size}: write WIDTHxHEIGHT, as in 512x512")
    if Path(args.vqgan).is_dir():
        image = VQTokenizer.from_pretrained(args.vqgan)
    elif args.vqgan_config is None:
        raise UserError(f"--vqgan-config: give the yaml that came with {args.vqgan}")
    else:
        image = VQTokenizer.from_taming(args.vqgan, args.vqgan_config)
    size = (int(width), int(height))
    model = import_official(args.checkpoint, image, args.text_tokenizer, size, args.backbone_config)
    model.save_pretrained(args.out)
    network, vocabulary = model.model, model.joint.vocabulary
    print(
        f"{args.out}: {len(network.adaln)} layers of width {network.backbone.config.hidden_size}, vocabulary "
        f"{vocabulary.size}; sample it: python sample.py {args.out} --task pair --domain xray --out OUT"
    )
