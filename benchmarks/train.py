"""Training steps: packed rows and the restricted head against padded rows with all logits, and a plain causal trainer.

    python -m benchmarks.train                                     # the demo trunk with V=40,196, on a CPU: 3 minutes
    python -m benchmarks.train --preset tiny --repeats 1           # small
    python -m benchmarks.train --device cuda --preset 1b --equal --adaln --compile      # MFU on a GPU; also --preset 3b

What is compared, on the same studies with the same positions masked, each with AdamW:

- ``ours``: the objective as `train.py` runs it: several studies a row; logits of masked positions, their own columns.
- ``full``: the same network; one study a row, padded to the longest; logits [B, L, V]; cross-entropy of all columns.
- ``plain``: the same backbone from transformers without AdaLN, as HuggingFace's Trainer runs it: padded rows with an
  attention mask, labels of -100 at given positions, its own loss.
- ``ours, no AdaLN``: what the noise level costs (with --adaln).

Reports have unequal lengths, drawn with the mean, 95th percentile and maximum of Open-i's findings, or all the longest
(--equal). `peak` is what forward and backward need beyond weights, gradients and moments, which all are there before
(`benchmarks.report.peak_memory`). TFLOP/s and MFU are of the FLOPs that ours needs (`medim.model.flops`: no padding,
nothing twice; AdaLN only where it is), whatever else a way multiplies. On a CPU the ways take turns; on a GPU each runs
alone, since two would not fit.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1]))  # so that `python benchmarks/train.py` runs too

from benchmarks import report
from medim.canvas import Canvas, Segment, layout
from medim.model.backbone import BackboneOptions, config_from_options, decoder_layers
from medim.model.flops import TERA, Costs, Work, peak_of, total
from medim.model.medim import MeDiMModel, ModelOptions
from medim.objective import Batch, ObjectiveOptions, count, loss, make_batch
from medim.training.weights import skeleton
from medim.vocabulary import KINDS, Vocabulary

MiB = 2**20
SIZE = 40_196  # V, of MeDiM
CODES = 8192


@dataclass(frozen=True)
class Preset:
    """A trunk and its canvas: codes of an image, longest report, positions of a packed row, studies a step."""

    trunk: BackboneOptions
    adaln_dim: int
    codes: int
    longest: int
    pack: int
    batch: tuple[int, ...]
    vocabulary: Vocabulary
    places: int = 0


def _trunk(width: int, layers: int, heads: int, key_heads: int, inner: int) -> BackboneOptions:
    return BackboneOptions(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        intermediate_size=inner,
        rope_theta=10000,
    )


def presets() -> dict[str, Preset]:
    """By name; ``demo`` has the trunk of configs/train/demo_scratch.yaml."""
    from medim.config import load
    from medim.recipe import TrainConfig

    demo = load(Path(__file__).parents[1] / "configs/train/demo_scratch.yaml", [], TrainConfig).model
    tags = len(Vocabulary.build(1, 0, 1).tags)
    large = Vocabulary.build(SIZE - CODES - tags, 0, CODES)
    return {
        "tiny": Preset(_trunk(32, 2, 2, 1, 48), 16, 9, 12, 48, (4,), Vocabulary.build(300, 0, 64)),
        "demo": Preset(demo.backbone, demo.adaln_dim, 144, 313, 512, (16,), large, demo.places),
        "1b": Preset(_trunk(2048, 22, 32, 4, 5632), 256, 1024, 256, 0, (4, 8, 16), large),
        "3b": Preset(_trunk(3072, 28, 24, 8, 8192), 256, 1024, 256, 0, (2, 4, 8), large),
    }


def lengths(n: int, longest: int, seed: int) -> list[int]:
    """Report lengths as those of Open-i: log-normal, 95th percentile 1.97 and maximum 5.2 times the mean.

    The first is the longest, as in a large batch one is.
    """
    mean, spread = longest / 5.2, 0.47
    drawn = np.random.default_rng(seed).lognormal(np.log(mean) - spread**2 / 2, spread, n)
    return [longest, *np.clip(drawn.round().astype(int), 1, longest).tolist()[1:]]


class Case:
    """One preset with one number of studies, and the networks that are compared."""

    def __init__(self, preset: Preset, studies: int, o: argparse.Namespace) -> None:
        self.o, self.preset, self.studies = o, preset, studies
        self.objective = ObjectiveOptions(tasks={"pair": 1.0})
        vocabulary, rng = preset.vocabulary, np.random.default_rng(o.seed)
        sizes = [preset.longest] * studies if o.equal else lengths(studies, preset.longest, o.seed)
        rows = []
        for size in sizes:
            codes = Segment("image", "xray", rng.integers(*vocabulary.image, preset.codes).tolist())
            rows.append(
                layout([codes, Segment("report", "text", rng.integers(*vocabulary.text, size).tolist())], vocabulary)
            )
        self.padded = self._noised(Canvas.collate(rows, vocabulary.eos))
        self.packed = self._noised(Canvas.pack(rows, vocabulary.eos, preset.pack)) if preset.pack else self.padded
        self.labels = torch.full((self.padded.canvas.ids.numel(),), -100, device=o.device)
        for places, targets in zip(self.padded.rows, self.padded.targets, strict=True):
            self.labels[places] = targets
        self.labels = self.labels.view_as(self.padded.canvas.ids)
        self.count = count(self.padded, self.objective)

    def _noised(self, canvas: Canvas) -> Batch:
        """The masks are a function of the study's place, so packing does not change them."""
        places = list(range(self.studies))
        o, mask = self.objective, self.preset.vocabulary.mask
        return make_batch(canvas, places, self.studies, 0, self.o.seed, o, mask).to(self.o.device)

    def precision(self) -> AbstractContextManager[Any]:
        """As train.py: weights in float32, products in bf16 where that is asked for."""
        return torch.autocast(self.o.device.split(":")[0], torch.bfloat16, enabled=self.o.precision == "bf16")

    def network(self) -> MeDiMModel:
        """The model as it is trained."""
        torch.manual_seed(self.o.seed)
        model = self.skeleton().to(self.o.device).train()
        if self.o.checkpointing:
            model.recompute_blocks(self.o.checkpointing)
        if self.o.compile:
            model.compile_blocks()
        return model

    def skeleton(self) -> MeDiMModel:
        """The model, with or without weights, as the context wants."""
        trunk = BackboneOptions(**(vars(self.preset.trunk) | {"attn_implementation": self.o.attention}))
        options = ModelOptions(backbone=trunk, adaln_dim=self.preset.adaln_dim, places=self.preset.places)
        return MeDiMModel.from_options(options, self.preset.vocabulary)

    def plain_network(self) -> nn.Module:
        """The backbone from transformers itself, causal."""
        torch.manual_seed(self.o.seed)
        config = config_from_options(self.preset.trunk, self.preset.vocabulary.size)
        config.use_cache = False
        model = AutoModelForCausalLM.from_config(config, attn_implementation=self.o.attention)
        model = model.to(self.o.device).train()
        if self.o.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.o.compile:
            for layer in decoder_layers(model):
                layer.compile()
        return model

    def ours(self, model: MeDiMModel) -> Tensor:
        return loss(model, self.packed, self.objective).total / self.count

    def full(self, model: MeDiMModel) -> Tensor:
        batch = self.padded
        tagged = torch.cat([batch.t, torch.zeros_like(batch.t[:, :1])], dim=1)
        level = torch.where(batch.canvas.segment < 0, batch.t.shape[1], batch.canvas.segment)
        hidden = model(batch.canvas.ids, tagged, level, **model.attention(batch.canvas, batch.given))
        logits = model.head(hidden)
        return F.cross_entropy(logits.float().flatten(0, 1), self.labels.flatten(), reduction="sum") / self.count

    def plain(self, model: nn.Module) -> Tensor:
        canvas = self.padded.canvas
        mask = None if canvas.fill == "full" else canvas.valid.long()
        return model(input_ids=canvas.ids, attention_mask=mask, labels=self.labels).loss

    def ways(self) -> dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]]:
        """Of each way, what makes its network, and its loss."""
        found: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Tensor]]] = {
            "ours": (self.network, self.ours),
            "full": (self.network, self.full),
            "plain": (self.plain_network, self.plain),
        }
        if self.o.adaln:
            found["ours, no AdaLN"] = (lambda: NoAdaLN(self.network()), lambda model: model.loss(self))
        return found

    def work(self, batch: Batch) -> Work:
        """What is asked of a pass."""
        return Work.of(batch.canvas, batch.rows, self.o.attention, batch.given)


class NoAdaLN(nn.Module):
    """The same trunk and head without the noise level."""

    def __init__(self, model: MeDiMModel) -> None:
        super().__init__()
        self.inner = model
        model.adaln = nn.ModuleList()
        for layer in decoder_layers(model.backbone):
            for module in (layer, *layer.children()):
                module._forward_hooks.clear()
                module._forward_pre_hooks.clear()

    def loss(self, case: Case) -> Tensor:
        """As the objective's, flat weights."""
        model, batch = self.inner, case.packed
        hidden = model.backbone.get_decoder()(
            inputs_embeds=model.get_input_embeddings()(batch.canvas.ids),
            use_cache=False,
            is_causal=False,
            **{k: v for k, v in model.attention(batch.canvas, batch.given).items() if k != "place"},
        ).last_hidden_state
        starts, stops = zip(*(model.vocabulary.columns(kind) for kind in KINDS), strict=True)
        rows = torch.cat(batch.rows)
        nll = model.head(
            hidden.flatten(0, 1)[rows], torch.cat(batch.targets), starts, stops, tuple(map(len, batch.rows))
        )
        return nll.sum() / case.count


class Trainer:
    """A network with its optimizer; gradients keep their memory between steps, so that the peak is of passes alone."""

    def __init__(self, case: Case, make: Callable[[], nn.Module], forward: Callable[[Any], Tensor]) -> None:
        self.case, self.model, self.forward = case, make(), forward
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)

    def passes(self) -> float:
        """Forward and backward."""
        self.optimizer.zero_grad(set_to_none=False)
        with self.case.precision():
            value = self.forward(self.model)
        value.backward()
        return float(value.detach())

    def step(self) -> float:
        """And the update."""
        value = self.passes()
        self.optimizer.step()
        return value


def measure(preset: Preset, studies: int, o: argparse.Namespace) -> dict[str, Any]:
    """All figures with so many studies a step; prints their table."""
    case, absent = Case(preset, studies, o), dict[str, str]()
    found: dict[str, dict[str, Any]] = {}
    names = list(case.ways())
    for group in [names] if o.device == "cpu" else [[name] for name in names]:
        try:
            found |= _run(case, group)
        except torch.cuda.OutOfMemoryError:
            absent |= dict.fromkeys(group, "out of memory")
        gc.collect()
        if o.device != "cpu":
            torch.cuda.empty_cache()
    _rates(case, found)
    batches = {"ours": case.packed, "padded": case.padded}
    places = {name: batch.canvas.ids.numel() for name, batch in batches.items()}
    valid = int(case.padded.canvas.valid.sum())
    print(f"{studies} studies, {valid} positions: {places['ours']} in the rows of ours, {places['padded']} padded")
    print(
        report.table(
            [["", "samples/s", "of full", "peak MiB", "of full", "TFLOP/s", "MFU"], *map(_cells, found.items())]
        )
    )
    for name, reason in absent.items():
        print(f"{name}: {reason}")
    print()
    return {"ways": found, "not_run": absent, "positions": {"valid": valid, **places}}


def _run(case: Case, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Seconds and peaks of some ways, in turn."""
    ways, o = case.ways(), case.o
    trainers = {name: Trainer(case, *ways[name]) for name in names}
    taken = report.seconds({name: one.step for name, one in trainers.items()}, o.repeats, o.device)
    return {
        name: {"seconds": report.spread(taken[name]), "peak_bytes": report.peak_memory(one.passes, o.device)}
        for name, one in trainers.items()
    }


def _rates(case: Case, found: dict[str, dict[str, Any]]) -> None:
    """Put rates and ratios beside what was measured."""
    o = case.o
    peak = peak_of(report.device_name(o.device)) if o.device != "cpu" and o.precision == "bf16" else None
    with skeleton():
        needed = Costs.of(case.skeleton()).needed(case.work(case.packed))
    for name, figures in found.items():
        seconds = figures["seconds"]["median"]
        flops = total({part: each for part, each in needed.items() if part != "AdaLN" or name in ("ours", "full")})
        figures["samples_per_second"] = case.studies / seconds
        figures["flops_per_second"] = flops / seconds
        figures["mfu"] = flops / seconds / peak if peak else None
    for figures in found.values():
        for key in ("samples_per_second", "peak_bytes"):
            base = found.get("full", {}).get(key)
            figures[f"{key}_of_full"] = figures[key] / base if base and figures[key] is not None else None


def _cells(item: tuple[str, dict[str, Any]]) -> list[str]:
    name, figures = item
    peak, mfu = figures["peak_bytes"], figures["mfu"]
    ratios = [figures[f"{key}_of_full"] for key in ("samples_per_second", "peak_bytes")]
    faster, smaller = ("-" if value is None else f"{value:.2f}" for value in ratios)
    size, share = "-" if peak is None else f"{peak / MiB:.0f}", "-" if mfu is None else f"{mfu:.1%}"
    rate = f"{figures['flops_per_second'] / TERA:.3g}"
    return [name, f"{figures['samples_per_second']:.2f}", faster, size, smaller, rate, share]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--preset", default="demo", choices=["tiny", "demo", "1b", "3b"])
    found.add_argument("--batch", type=int, nargs="+", help="studies a step; the default is the preset's")
    found.add_argument("--device", default="cpu")
    found.add_argument("--precision", choices=["bf16", "fp32"], help="the default is fp32 on a CPU, bf16 elsewhere")
    found.add_argument("--attention", default="sdpa", help="sdpa, flash_attention_2, flex_attention, eager")
    found.add_argument("--equal", action="store_true", help="all reports are as long as the longest")
    found.add_argument("--adaln", action="store_true", help="also ours without AdaLN")
    found.add_argument("--compile", action="store_true", help="torch.compile each block")
    found.add_argument("--checkpointing", type=int, default=0, help="gradient checkpointing of every so manieth block")
    found.add_argument("--repeats", type=int, default=5)
    found.add_argument("--seed", type=int, default=0)
    return found


def main(argv: Sequence[str]) -> dict[str, Any]:
    """Run the benchmark; returns what its last line says."""
    o = parser().parse_args(argv)
    o.precision = o.precision or ("fp32" if o.device == "cpu" else "bf16")
    preset = presets()[o.preset]
    print(f"{report.device_name(o.device)}; {o.preset}, V={preset.vocabulary.size}, {o.precision}, {o.attention}\n")
    figures = {str(studies): measure(preset, studies, o) for studies in o.batch or preset.batch}
    return report.finish("train", figures, argv=argv, device=o.device, seed=o.seed, packages=("accelerate",))


if __name__ == "__main__":
    main(sys.argv[1:])
