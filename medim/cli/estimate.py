"""`medim estimate`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from medim.cli.common import make_parser, quiet
from medim.errors import UserError

if TYPE_CHECKING:
    from medim.estimate import Budget

HELP = """What a training run will cost, before a GPU is rented: nothing is trained, nothing is allocated.

  medim estimate configs/train/medim_7b_zero3.yaml            # for the cards that the config is meant for
  medim estimate configs/train/medim_7b_zero3.yaml --gpus 64
  medim estimate CONFIG train.batch_size=256 train.gradient_checkpointing=1 --gpus 8 --gpu A100 --card 40
  medim estimate CONFIG --json

Parameters, FLOPs of a step, bytes on each GPU by kind, the largest batch that fits, hours. Sizes are read from the
tokenizers that the config names, or from its section `estimate:` where they are not on this machine.

Hours follow from the MFU that is assumed, which counts model FLOPs: nothing twice, no padding. Bytes do not hold with
train.compile, which saves less."""


def estimate(argv: Sequence[str]) -> int:
    """`medim estimate CONFIG [a.b=c ...]`."""
    parser = make_parser("medim estimate", HELP)
    parser.add_argument("config", help="a YAML file, as those in configs/train/")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="settings that replace the file's")
    parser.add_argument("--gpus", type=int, help="over all nodes (the config's, or 1)")
    parser.add_argument("--zero", type=int, choices=range(4), help="ZeRO stage; 0 is DDP (the config's, or 0)")
    parser.add_argument("--offload", action="store_true", help="ZeRO-3 with its parts on the host")
    parser.add_argument("--gpu", help="kind of card, which gives its peak and memory (the config's, or H100)")
    parser.add_argument("--card", type=float, help="GiB of the card's memory instead (H100: 80)")
    parser.add_argument("--peak", type=float, help="TFLOP/s of the card instead")
    parser.add_argument("--mfu", type=float, default=0.4, help="share of the peak that is reached (0.4)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the tables")
    if not argv:
        parser.print_help()
        return 0
    args = parser.parse_intermixed_args(argv)
    for name in ("gpus", "card", "peak", "mfu"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: give a number above 0")
    quiet()
    from medim.config import load
    from medim.estimate import estimate as budget_of
    from medim.model.flops import CARDS, TERA
    from medim.recipe import TrainConfig
    from medim.training.memory import Sharing

    config = load(args.config, args.overrides, TrainConfig)
    meant = config.estimate
    gpu, zero = args.gpu or meant.gpu, meant.zero if args.zero is None else args.zero
    card = next((found for name, found in CARDS.items() if name.lower() == gpu.lower()), None)
    if card is None and (args.peak is None or args.card is None):
        raise UserError(f"--gpu {gpu}: known are {', '.join(CARDS)}; for others give --peak and --card")
    known, gib = card or (0.0, 0)
    peak, memory = TERA * (args.peak or known), float(args.card or gib)
    found = budget_of(config, Sharing(args.gpus or meant.gpus, zero, args.offload))
    if args.json:
        print(json.dumps(found.report(memory, peak, args.mfu)))
    else:
        print(f"{args.config}: {text(found, memory, peak, args.mfu)}")
    return 0


def text(found: Budget, card: float, peak: float, mfu: float) -> str:
    """The tables."""
    from medim.estimate import FREE
    from medim.model.flops import TERA, Flops, total
    from medim.training.memory import GIB

    sizes, o, sharing = found.sizes, found.config.train, found.sharing
    way = f", ZeRO-{sharing.zero}" if sharing.zero else ", DDP" if sharing.gpus > 1 else ""
    lines = [
        f"{sharing.gpus} x {card:g} GiB{way}{', offloaded' if sharing.offload else ''}, "
        f"{'bf16' if found.bf16 else 'fp32'}, {o.optimizer}, checkpointing {o.gradient_checkpointing}",
        f"rows of {sizes.length} positions, {sizes.together} studies each; {found.studies} studies at a time on a GPU",
        f"learnt from: {sizes.masked('text'):.0%} of the text, {sizes.masked('image'):.0%} of the codes in the mean",
        "",
        f"{'parameters, millions':32}{'all':>12}{'trained':>12}",
    ]
    sums = tuple(sum(part[i] for part in found.parameters.values()) for i in (0, 1))
    for part, (n, m) in (found.parameters | {"sum": (sums[0], sums[1])}).items():
        lines.append(f"  {part:30}{n / 1e6:12,.1f}{m / 1e6:12,.1f}")
    unit, scale = ("TFLOP", TERA) if total(found.needed) >= TERA else ("GFLOP", TERA / 1000)
    lines += [
        "",
        f"{unit + ' a step':20}{'model FLOPs':>12}{'forward':>12}{'backward':>12}{'again':>12}{'hardware':>12}",
    ]
    needed, computed = found.needed, found.computed
    computed = computed | {"sum": Flops(*(sum(part[i] for part in computed.values()) for i in range(3)))}
    for part, flops in computed.items():
        useful = total(needed) if part == "sum" else sum(needed[part])
        row = "".join(f"{value / scale:12,.4g}" for value in (useful, *flops, sum(flops)))
        lines.append(f"  {part:18}{row}")
    held = found.bytes(found.studies)
    unit, scale = ("GiB", GIB) if sum(held.values()) >= GIB else ("MiB", 2**20)
    lines += ["", f"{unit} on each GPU"]
    lines += [f"  {kind:30}{value / scale:12.2f}" for kind, value in held.items() if value >= 1]
    room = f"{card * FREE * GIB / scale:,.1f} that a card of {card:g} GiB leaves"
    lines.append(f"  {'sum':30}{sum(held.values()) / scale:12.2f}  of {room}")
    if found.host:
        lines.append(f"  {'on the host for each GPU':30}{sum(found.host.values()) / scale:12.2f}")
    most, hours = found.largest(card), found.hours(peak, mfu)
    share = sharing.gpus * o.accumulate
    lines += [
        "",
        f"largest batch that fits: {most} studies at a time on each GPU: train.batch_size={most * share}"
        if most
        else "not even one study at a time fits",
        f"{o.steps:,} steps at MFU {mfu:g} of {peak / TERA:g} TFLOP/s: {hours:,.1f} hours, "
        f"{hours * sharing.gpus:,.1f} GPU-hours",
    ]
    return "\n".join(lines)
