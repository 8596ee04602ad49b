"""Time and peak memory of the training head, forward and backward: restricted against all logits.

    python -m benchmarks.head
    python -m benchmarks.head --vocabulary 60+20+2 --codes 12 --text 4 --width 8 --repeats 1      # small, for a CPU
    python -m benchmarks.head --device cuda --dtype bfloat16 --batch 8 --width 4096

What is compared, on the same hidden states [B, L, D], output matrix [V, D] and masked positions:

- ``full``: logits [B, L, V], cross-entropy with the given positions ignored.
- ``rows``: logits of the masked rows only, over all V columns.
- ``restricted``: `medim.model.head`, only the columns of a row's modality, all modalities in one call.
- ``restricted, 2 calls``: the same, a call for each modality.
- ``cut-cross-entropy``, ``liger``: fused linear cross-entropy libraries, if one is installed and runs on the device.

`peak` is what a call needs beyond its inputs (`benchmarks.report.peak_memory` says how it is measured): with the
gradients of hidden states and matrix, which each of them must make. The first command takes some minutes and 4 GB.
The floor is by count: three products of each logit's D terms, and the bytes of both gradients.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/head.py` runs too

from benchmarks import report
from medim.model.head import RestrictedHead

MiB = 2**20
LIBRARIES = ("cut-cross-entropy", "liger-kernel")


@dataclass(frozen=True)
class Case:
    """One vocabulary's inputs; text ids come first, then tags, then codes.

    Attributes:
        rows: masked places of the flattened [B*L], those of text first.
        targets: their ids.
        counts: how many are of text and of codes.
        labels: the same for all positions, -100 at given ones.
    """

    head: RestrictedHead
    hidden: Tensor
    rows: Tensor
    targets: Tensor
    counts: tuple[int, int]
    labels: Tensor
    starts: tuple[int, int]
    stops: tuple[int, int]

    @classmethod
    def make(cls, sizes: tuple[int, int, int], o: argparse.Namespace) -> Case:
        """Random inputs at sizes of text, codes and tags; of each modality the share `o.mask_rate` is masked."""
        text, codes, tags = sizes
        generator = torch.Generator().manual_seed(o.seed)
        size, length = text + codes + tags, o.text + o.codes
        starts, stops = (0, text + tags), (text, size)
        kind = (torch.arange(length) < o.codes).long().repeat(o.batch)  # 1: a code
        noise = torch.rand(o.batch * length, generator=generator)
        rows = []
        for number in range(2):
            places = (kind == number).nonzero().squeeze(1)
            rows.append(places[noise[places].argsort()[: round(o.mask_rate * len(places))]].sort().values)
        targets = torch.cat(
            [torch.randint(a, b, (len(r),), generator=generator) for a, b, r in zip(starts, stops, rows, strict=True)]
        )
        labels = torch.full((o.batch * length,), -100).index_copy(0, torch.cat(rows), targets)
        head = RestrictedHead(o.width, size)
        with torch.no_grad():
            head.weight.copy_(torch.randn(size, o.width, generator=generator) * 0.02)
        hidden = torch.randn(o.batch, length, o.width, generator=generator)
        kwargs: dict[str, Any] = {"device": o.device, "dtype": getattr(torch, o.dtype)}
        return cls(
            head.to(**kwargs),
            hidden.to(**kwargs).requires_grad_(),
            torch.cat(rows).to(o.device),
            targets.to(o.device),
            (len(rows[0]), len(rows[1])),
            labels.to(o.device),
            starts,
            stops,
        )

    def logits(self) -> dict[str, int]:
        """How many logits each way computes."""
        size, n = self.head.out_features, len(self.rows)
        own = sum(c * (b - a) for c, a, b in zip(self.counts, self.starts, self.stops, strict=True))
        return {"full": self.labels.numel() * size, "rows": n * size, "restricted": own}

    def full(self) -> Tensor:
        return F.cross_entropy(self.head(self.hidden).flatten(0, 1).float(), self.labels, reduction="sum")

    def rows_only(self) -> Tensor:
        hidden = self.hidden.flatten(0, 1)[self.rows]
        return F.cross_entropy(self.head(hidden).float(), self.targets, reduction="sum")

    def restricted(self) -> Tensor:
        hidden = self.hidden.flatten(0, 1)[self.rows]
        return self.head(hidden, self.targets, self.starts, self.stops, self.counts).sum()

    def restricted_calls(self) -> Tensor:
        total, flat = self.hidden.new_zeros(()), self.hidden.flatten(0, 1)
        parts = zip(self.rows.split(self.counts), self.targets.split(self.counts), self.starts, self.stops, strict=True)
        for rows, targets, start, stop in parts:
            total = total + self.head(flat[rows], targets, start, stop).sum()
        return total

    def cut_cross_entropy(self) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        impl = "cce" if self.hidden.device.type == "cuda" else "torch_compile"
        flat = self.hidden.flatten(0, 1)
        return linear_cross_entropy(flat, self.head.weight, self.labels, reduction="sum", impl=impl)

    def liger(self) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        flat = self.hidden.flatten(0, 1)
        return liger_fused_linear_cross_entropy(flat, self.head.weight, self.labels, reduction="sum")

    def ways(self) -> dict[str, Callable[[], Tensor]]:
        """What needs nothing but torch."""
        return {
            "full": self.full,
            "rows": self.rows_only,
            "restricted": self.restricted,
            "restricted, 2 calls": self.restricted_calls,
        }

    def step(self, forward: Callable[[], Tensor]) -> Callable[[], float]:
        """Forward and backward; the gradients are dropped after."""

        def run() -> float:
            value = forward()
            value.backward()
            self.head.weight.grad = self.hidden.grad = None
            return float(value.detach())

        return run


def measure(parts: tuple[int, int, int], o: argparse.Namespace) -> dict[str, Any]:
    """All figures at one vocabulary (sizes of text, codes, tags); prints their table."""
    case = Case.make(parts, o)
    ways = {name: case.step(forward) for name, forward in case.ways().items()}
    absent = {}
    expected = ways["rows"]()
    for name, forward in {"cut-cross-entropy": case.cut_cross_entropy, "liger": case.liger}.items():
        try:
            value = case.step(forward)()
        except ImportError as error:
            absent[name] = f"not installed, or it lacks something: {error}"
        except Exception as error:  # a library may fail in any way where it was not meant to run
            absent[name] = f"does not run here: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        else:
            if abs(value - expected) > 1e-2 * abs(expected):
                absent[name] = f"wrong here: a loss of {value:.1f} instead of {expected:.1f}"
            else:
                ways[name] = case.step(forward)
    taken = report.seconds(ways, o.repeats, o.device)
    peaks = {name: report.peak_memory(way, o.device) for name, way in ways.items()}
    found: dict[str, Any] = {}
    rows = [["V = " + f"{case.head.out_features:,}", "seconds", "(min-max)", "of full", "peak MiB", "of full"]]
    for name in ways:
        time, peak, base = report.spread(taken[name]), peaks[name], peaks["full"]
        found[name] = {
            "seconds": time,
            "seconds_of_full": time["median"] / report.spread(taken["full"])["median"],
            "peak_bytes": peak,
            "peak_of_full": peak / base if peak is not None and base else None,
        }
        rows.append([
            name, f"{time['median']:.4f}", f"({time['min']:.4f}-{time['max']:.4f})",
            f"{found[name]['seconds_of_full']:.3f}", "-" if peak is None else f"{peak / MiB:.1f}",
            "-" if found[name]["peak_of_full"] is None else f"{found[name]['peak_of_full']:.3f}",
        ])  # fmt: skip
    print(report.table(rows))
    for name, reason in absent.items():
        print(f"{name}: {reason}")
    floor = count(case, o)
    print(
        f"by count: {floor['gflop']['full']:.1f} GFLOP full, {floor['gflop']['restricted']:.1f} restricted "
        f"({floor['share']:.3f}, {floor['seconds']['restricted']:.4f} s at this device's {floor['gflops']:.0f} GFLOP/s "
        f"in a product of {floor['product']}); gradients {floor['gradient_bytes'] / MiB:.1f} MiB\n"
    )
    return {"ways": found, "not_run": absent, "floor": floor}


def count(case: Case, o: argparse.Namespace) -> dict[str, Any]:
    """The floor: FLOPs of three products (logits and both gradients), at the rate of one large product."""
    columns = min(case.stops[1] - case.starts[1], 8192)
    left, right = case.hidden.detach().flatten(0, 1), case.head.weight.detach()[-columns:].T
    taken = report.seconds({"product": lambda: left @ right}, max(3, o.repeats), o.device)["product"]
    rate = 2 * left.numel() * right.shape[1] / min(taken)
    flop = {name: 6 * case.head.in_features * logits for name, logits in case.logits().items()}
    return {
        "gflop": {name: value / 1e9 for name, value in flop.items()},
        "share": flop["restricted"] / flop["full"],
        "seconds": {name: value / rate for name, value in flop.items()},
        "gflops": rate / 1e9,
        "product": f"{left.shape[0]}x{left.shape[1]}x{right.shape[1]}",
        "gradient_bytes": case.hidden.element_size() * (case.head.weight.numel() + case.hidden.numel()),
        "logits": case.logits(),
    }


def sizes(said: str) -> tuple[int, int, int]:
    """Sizes of text, codes and tags from the command line."""
    parts = said.split("+")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        raise argparse.ArgumentTypeError(f"{said}: three numbers are needed, as 32000+8192+4")
    return int(parts[0]), int(parts[1]), int(parts[2])


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--vocabulary", nargs="+", type=sizes, default=[(32000, 8192, 4), (256000, 8192, 0)],
        metavar="TEXT+CODES+TAGS", help="sizes of a vocabulary's parts; the default is MeDiM's and Liquid's",
    )  # fmt: skip
    found.add_argument("--codes", type=int, default=1024, help="codes in a row")
    found.add_argument("--text", type=int, default=256, help="text tokens in a row")
    found.add_argument("--batch", type=int, default=1)
    found.add_argument("--width", type=int, default=256)
    found.add_argument("--mask-rate", type=float, default=0.5)
    found.add_argument("--device", default="cpu")
    found.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--seed", type=int, default=0)
    return found


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark; returns what its last line says."""
    o = parser().parse_args(argv)
    print(f"{report.device_name(o.device)}; B={o.batch} L={o.codes}+{o.text} D={o.width} {o.dtype}\n")
    figures = {str(sum(one)): measure(one, o) for one in o.vocabulary}
    return report.finish("head", figures, argv=argv, device=o.device, seed=o.seed, packages=LIBRARIES)


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
