"""`tokenizers/train_vq.py` and `medim tokenizer`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from medim.cli.common import make_parser, pick_device, quiet
from medim.errors import UserError

TRAIN = """Train an image tokenizer, or go on with a run that was stopped.

  python tokenizers/train_vq.py configs/tokenizer/demo.yaml                                 # embedded pictures
  python tokenizers/train_vq.py configs/tokenizer/vq_256_f16.yaml data.root=DIR             # a folder of pictures
  accelerate launch --num_processes 8 tokenizers/train_vq.py CONFIG data.source=mimic-cxr data.root=DIR

Run the same command again to resume after the last complete checkpoint. RUN_DIR/final is the tokenizer;
RUN_DIR/metrics.jsonl has a line every few steps, RUN_DIR/reconstructions originals above what their codes give."""

CHECK = """Load an image tokenizer, say what it is, and send pictures through it.

  medim tokenizer check demo                                        # the shipped one
  medim tokenizer check runs/vq/final --image a.png --image b.png
  medim tokenizer check vqgan.ckpt --config vqgan.yaml --save DIR   # taming's or Chameleon's, kept as a folder of ours

Without --image the pictures are held-out embedded ones. A checkpoint's pickled classes are never run."""

SWAP = """Give a trained model another image tokenizer of the same downsampling, then train on with `init: DIR`.

  medim tokenizer swap demo runs/vq_demo/final --out runs/swapped

A new code starts as the mean of the old codes that lie in the same places of the same pictures, here embedded ones, or
those of --source SOURCE --root DIR. Only the rows of the codes change; text, tags and layers stay."""

ACTIONS = {
    "check": "load one, ours or a published VQGAN, and send pictures through it",
    "swap": "give a trained model another image tokenizer",
}
EMBEDDED = 8  # pictures of each domain


def train_vq(argv: Sequence[str]) -> int:
    """`tokenizers/train_vq.py CONFIG [a.b=c ...]`."""
    parser = make_parser("train_vq.py", TRAIN)
    parser.add_argument("config", help="a YAML file, as those in configs/tokenizer/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_args(argv)
    from medim.config import dump, load
    from medim.training.vq import VQRunConfig
    from medim.training.vq import train_vq as run

    config = load(args.config, args.overrides, VQRunConfig)
    command = "python tokenizers/train_vq.py " + shlex.join(argv)
    final = run(config, dump(config), command)
    if final is not None:
        print(f"tokenizer: {final}")
    return 0


def tokenizer(argv: Sequence[str]) -> int:
    """`medim tokenizer check ...`."""
    if not argv or argv[0] in ("-h", "--help"):
        print("medim tokenizer ACTION ...\n")
        print("\n".join(f"  medim tokenizer {name:7}{text}" for name, text in ACTIONS.items()))
        return 0
    if argv[0] not in ACTIONS:
        raise UserError(f"medim tokenizer {argv[0]}: unknown; one of {', '.join(ACTIONS)}")
    return (_check if argv[0] == "check" else _swap)(argv[1:])


def _check(argv: Sequence[str]) -> int:
    parser = make_parser("medim tokenizer check", CHECK)
    parser.add_argument("name", help="demo, a folder of ours, or a checkpoint file of taming or Chameleon")
    parser.add_argument("--config", help="the yaml that came with a checkpoint file")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may be repeated")
    parser.add_argument("--gray", action="store_true", help="pictures of --image are gray")
    parser.add_argument("--out", metavar="DIR", help="write DIR/round_trip.png: originals | reconstructions")
    parser.add_argument("--save", metavar="DIR", help="write the tokenizer as a folder of ours")
    parser.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    args = parser.parse_args(argv or ["--help"])
    quiet()
    import PIL.Image

    from medim.data import embedded
    from medim.data.prepare import codebook_hash
    from medim.training.vq_evaluation import evaluate, round_trip, tiled
    from medim.vocabulary import MODALITIES

    model, origin = _load(args.name, args.config)
    if args.save:
        model.save_pretrained(args.save, {"origin": origin})
    c = model.config
    h, w = model.grid(c.resolution, c.resolution)
    print(f"{args.name}: K {c.n_embed}, f {c.downsampling}, {c.resolution} px, {h}x{w} codes of width {c.embed_dim}")
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, hash {codebook_hash(model)}")
    model.to(pick_device(args.device))
    pictures: dict[str, list[PIL.Image.Image]] = {}
    if args.image:
        kind = "xray" if args.gray else "pathology"
        pictures[kind] = [model.prepare(file, args.gray) for file in args.image]
    else:
        for name, study in embedded.DOMAINS.items():
            side = embedded.side_for(c.resolution)
            found = (study(0, index, "test", pixels=side).images[0].pixels for index in range(EMBEDDED))
            pictures[name] = [model.prepare(one, MODALITIES[name].gray) for one in found]
    rows = evaluate(model, pictures)
    names = {name: "images" if args.image else name for name in pictures}
    for key, name in names.items():
        figures = rows[key]
        print(
            f"{name:10} n {figures['images']}: PSNR {figures['psnr_db']} dB, SSIM {figures['ssim']}, "
            f"{figures['codes_used']} codes used, perplexity {figures['perplexity']}"
        )
    if args.out:
        sheet = []
        for name, originals in pictures.items():
            again = round_trip(model, originals, MODALITIES[name].gray)[1]
            sheet += [list(pair) for pair in zip(originals, again, strict=True)]
        Path(args.out).mkdir(parents=True, exist_ok=True)
        tiled(sheet).save(Path(args.out) / "round_trip.png")
        print(f"originals | reconstructions: {Path(args.out) / 'round_trip.png'}")
    if args.save:
        print(f"saved: {args.save}")
    return 0


def _swap(argv: Sequence[str]) -> int:
    parser = make_parser("medim tokenizer swap", SWAP)
    parser.add_argument("model", help="a model folder, or demo")
    parser.add_argument("tokenizer", help="folder of the new image tokenizer")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the model goes")
    parser.add_argument("--source", default="demo", help="of pictures: demo, images, or a reader of `medim prepare`")
    parser.add_argument("--root", metavar="DIR", help="its folder")
    parser.add_argument("--pictures", type=int, default=2000, help="that codes are counted on (2000)")
    args = parser.parse_args(argv or ["--help"])
    quiet()
    from tqdm import tqdm

    from medim.pipeline import MeDiM
    from medim.swap import shared_places, swap_image_tokenizer
    from medim.tokenization.image import VQTokenizer
    from medim.training.vq_data import PictureOptions, open_pictures

    if args.pictures < 1:
        raise UserError(f"--pictures {args.pictures}: at least one")
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise UserError(f"--out {args.out}: is not empty")
    model, image = MeDiM.from_pretrained(args.model), VQTokenizer.from_pretrained(args.tokenizer)
    image.prepare_at(model.joint.image.config.resolution)
    pictures = open_pictures(PictureOptions(args.source, args.root), image.config.resolution, 0, image.config.fit)
    steps = tqdm(range(-(-args.pictures // 20)), desc="comparing", unit="batch")
    counts = shared_places(model.joint.image, image, (pictures.batch(step, range(20)) for step in steps))
    swap_image_tokenizer(model, image, counts).save_pretrained(args.out)
    print(f"{args.out}: {args.model} with {args.tokenizer}; train it further: python train.py CONFIG init={args.out}")
    return 0


def _load(name: str, config: str | None):  # type: ignore[no-untyped-def]
    from medim.pipeline import ASSETS
    from medim.tokenization.image import VQTokenizer

    if name == "demo" or Path(name).is_dir():
        if config:
            raise UserError(f"--config {config}: {name} is a folder of ours, which holds its own config; leave it out")
        folder = ASSETS / "demo" / "image_tokenizer" if name == "demo" else Path(name)
        return VQTokenizer.from_pretrained(folder), name
    if not Path(name).is_file():
        raise UserError(f"{name}: no such folder or file; give demo, a folder of ours, or a checkpoint with --config")
    if not config:
        raise UserError(f"{name}: a checkpoint file needs the yaml that came with it: --config FILE.yaml")
    return VQTokenizer.from_taming(name, config), Path(name).name
