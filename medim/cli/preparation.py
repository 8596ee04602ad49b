"""`medim prepare`."""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from medim.cli.common import described, make_parser, pick_device, quiet
from medim.errors import UserError

HELP = """Encode studies once, so that training never waits for pixels.

  medim prepare demo --studies 6000 --out runs/data/demo            # the embedded X-ray phantom and H&E tiles
  medim prepare mimic-cxr /data/mimic-cxr-jpg --out data/mimic      # PhysioNet's own tree
  medim prepare SOURCE --help                                       # the tree a source expects, and its options
  medim inspect data/mimic                                          # then look at what came out

Images are encoded to integers, reports are cleaned, both are written to shards of Arrow. An interrupted run goes on
where it stopped when the same command is run again. A file that cannot be read is skipped and named in index.json.

Several processes or machines share the work: `accelerate launch -m medim prepare ...`, or --shard 0/4, 1/4, ... of
a job array; whoever is last writes the index.

Sources:
{sources}

Reports (--reports.NAME VALUE):
{reports}"""


def prepare(argv: Sequence[str]) -> int:
    """`medim prepare SOURCE [ROOT] --out DIR`."""
    if not argv or argv[0].startswith("-"):
        print(_general_help())
        return 0
    quiet()
    from medim.data.reports import ReportOptions
    from medim.data.sources import SOURCES

    name, *rest = argv
    if name not in SOURCES:
        raise UserError(f"medim prepare {name}: unknown source; one of {', '.join(SOURCES)}")
    source = SOURCES[name]
    parser = make_parser(f"medim prepare {name}", f"{source.about}\n\nExpects:\n{source.layout}")
    parser.add_argument("root", nargs="?", default=None, metavar="ROOT", help="folder or file of the source")
    parser.add_argument("--out", required=True, help="folder of the dataset")
    parser.add_argument("--image-tokenizer", default=None, help="folder of a VQ tokenizer (default: the shipped one)")
    parser.add_argument("--text-tokenizer", default=None, help="folder of a text tokenizer (default: the shipped one)")
    parser.add_argument("--fit", choices=("crop", "pad"), default=None, help="to a square (default: the tokenizer's)")
    parser.add_argument("--resolution", type=int, default=None, help="pixels a side (default: the tokenizer's)")
    parser.add_argument("--shard", default=None, metavar="I/N", help="write only the shards I, I+N, I+2N, ...")
    parser.add_argument("--shard-size", type=int, default=5000, help="studies a shard (5000)")
    parser.add_argument("--batch-size", type=int, default=32, help="studies read, and pictures encoded, at once (32)")
    parser.add_argument("--workers", type=int, default=None, help="threads that read ahead (8 with CUDA, else 0)")
    parser.add_argument("--max-broken", type=float, default=1.0, metavar="PERCENT", help="of unreadable studies (1)")
    parser.add_argument("--limit", type=int, default=None, help="only the first so many studies, to try it")
    names = ["--augmented"] if "views" in get_type_hints(source.options) else ["--views", "--augmented"]
    about = "codes stored of each image: as it is, and N - 1 times turned, moved and scaled a little (1)"
    parser.add_argument(*names, dest="augmented", type=int, default=1, metavar="N", help=about)
    parser.add_argument("--device", default=None, help="cuda, cuda:1, cpu (default: cuda where there is one)")
    for title, schema, prefix in ((f"options of {name}", source.options, ""), ("reports", ReportOptions, "reports.")):
        group = parser.add_argument_group(title)
        for field, about, many in described(schema):
            action = "append" if many else "store"
            group.add_argument(f"--{prefix}{field}", dest=f"={prefix}{field}", action=action, help=about, metavar="X")
    args = parser.parse_args(rest or ["--help"])
    for option in ("shard_size", "batch_size", "limit", "augmented", "resolution"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise UserError(f"--{option.replace('_', '-')} {getattr(args, option)}: give at least 1")
    root = _root(name, args.root, source.packaged)
    return _run(name, root, args, _overrides(args, source.options), _overrides(args, ReportOptions, "reports."))


def _run(name: str, root: Path | None, args: argparse.Namespace, chosen: list[str], cleaning: list[str]) -> int:
    import itertools

    from medim.config import load
    from medim.data import embedded
    from medim.data.prepare import Encoding
    from medim.data.prepare import prepare as write
    from medim.data.reports import ReportOptions
    from medim.data.sources import SOURCES
    from medim.data.sources.base import provenance
    from medim.data.sources.demo import DemoOptions
    from medim.pipeline import ASSETS
    from medim.tokenization.image import VQTokenizer
    from medim.tokenization.text import TextTokenizer

    source = SOURCES[name]
    options: Any = load(None, chosen, source.options)
    reports = load(None, cleaning, ReportOptions)
    part, device = _part(args.shard), pick_device(args.device or _own_gpu())
    tokenizer = VQTokenizer.from_pretrained(args.image_tokenizer or ASSETS / "demo" / "image_tokenizer").to(device)
    if args.fit:
        tokenizer.config = dataclasses.replace(tokenizer.config, fit=args.fit)
    if args.resolution is not None:
        tokenizer.prepare_at(args.resolution)
    if isinstance(options, DemoOptions) and options.pixels is None:
        options = dataclasses.replace(options, pixels=embedded.side_for(tokenizer.config.resolution))
    how = Encoding(
        tokenizer,
        TextTokenizer.from_pretrained(args.text_tokenizer or ASSETS / "demo" / "text_tokenizer"),
        reports,
        args.shard_size,
        args.batch_size,
        part,
        args.workers if args.workers is not None else 8 if device.startswith("cuda") else 0,
        args.max_broken,
        args.augmented,
    )
    total = getattr(options, "studies", None) if name == "demo" else None
    index = write(
        lambda: itertools.islice(source.read(root, options), args.limit),
        how,
        args.out,
        source=name,
        options=provenance(options, reports, args.limit),
        total=min(total, args.limit or total) if total else None,
    )
    if not index:
        print(f"shards {part[0]}/{part[1]} are written; the index comes when those of the others are: {args.out}")
        return 0
    splits = ", ".join(f"{count} {split}" for split, count in index["splits"].items())
    print(f"{index['studies']} studies ({splits}), {len(index['skipped'])} skipped: {args.out}")
    if index["skipped"]:
        first = index["skipped"][0]
        print(f"  first skipped: {first['id']}: {first['reason']} (all in {args.out}/index.json)")
    print(f"look at it: medim inspect {args.out}")
    return 0


def _general_help() -> str:
    from medim.data.reports import ReportOptions
    from medim.data.sources import SOURCES

    listed = "\n".join(f"  {name:11}{source.about}" for name, source in SOURCES.items())
    reports = "\n".join(f"  {name:17}{about}" for name, about, _ in described(ReportOptions))
    return HELP.format(sources=listed, reports=reports)


def _root(name: str, root: str | None, packaged: bool) -> Path | None:
    if name == "demo":
        if root is not None:
            raise UserError("medim prepare demo takes no ROOT: the embedded studies are in the package")
        return Path()
    if root is None and packaged:
        return None
    if root is None:
        raise UserError(
            f"medim prepare {name}: give the ROOT of the source, as in: medim prepare {name} ROOT --out DIR"
        )
    if not Path(root).exists():
        raise UserError(f"{root}: no such file or folder")
    return Path(root)


def _overrides(args: argparse.Namespace, schema: type, prefix: str = "") -> list[str]:
    """What was given of the options of `schema`, as ``key=value``."""
    hints, found = get_type_hints(schema), []
    for field in dataclasses.fields(schema):
        given = getattr(args, f"={prefix}{field.name}")
        if isinstance(given, list):  # a mapping: --columns id=study --columns report=text
            found += [f"{field.name}.{one}" for one in given]
        elif given is not None:
            several = "tuple" in str(hints[field.name]) and not given.startswith("[")
            found.append(f"{field.name}=[{given}]" if several else f"{field.name}={given}")
    return found


def _part(given: str | None) -> tuple[int, int]:
    """Which shards are this process's: --shard, or its rank under accelerate and torchrun."""
    if given is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    found = re.fullmatch(r"(\d+)/(\d+)", given)
    if not found or int(found[1]) >= int(found[2]):
        raise UserError(f"--shard {given}: give I/N with I from 0 to N-1, such as 0/4")
    return int(found[1]), int(found[2])


def _own_gpu() -> str | None:
    import torch

    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None
