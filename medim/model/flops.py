"""FLOPs of a training step, counted from shapes: matrix products only, two for a product and its sum.

Two counts, which must not be mixed:

- ``needed``: what the mathematics asks for. Positions without padding, pairs of positions that may attend to another,
  each product once forward and, where gradients are wanted, once for each of its two factors backward. MFU (model FLOPs
  utilisation, Chowdhery et al. 2022, arXiv 2204.02311, appendix B) is this by seconds by the peak of the hardware.
- ``computed``: what this code multiplies. Padding, pairs that a dense mask hides, scores that fused attention computes
  again backward, blocks that gradient checkpointing computes again, softmaxes that the head makes again.

Shape letters: B batch, L canvas length, D hidden width, E width of the time embedding, T noise levels a row, N
supervised rows, C columns of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from medim.canvas import Canvas
from medim.model import head as heads
from medim.model.adaln import AdaLN
from medim.model.backbone import decoder_layers
from medim.vocabulary import KINDS

if TYPE_CHECKING:
    from medim.model.medim import MeDiMModel

TERA = 1e12
# bf16 products without sparsity, TFLOP/s, and memory in GiB; from the makers' data sheets. The first that fits a
# device's name counts, so special forms come first.
CARDS: dict[str, tuple[float, int]] = {
    "B200": (2250, 180),
    "H200": (989, 141),
    "H100 PCIe": (756, 80),
    "H100": (989, 80),
    "A100": (312, 80),
    "L40S": (362, 48),
    "A6000": (155, 48),
    "A10": (125, 24),
    "L4": (121, 24),
    "RTX 4090": (165, 24),
    "RTX 3090": (71, 24),
    "MI300X": (1307, 192),
}


def peak_of(device: str) -> float | None:
    """FLOP/s in bf16 of a device by its name, as `torch.cuda.get_device_name` says it; None: not in the table.

    >>> peak_of("NVIDIA A100-SXM4-80GB")
    312000000000000.0
    """
    return next((peak * TERA for name, (peak, _) in CARDS.items() if set(_words(name)) <= set(_words(device))), None)


def _words(name: str) -> list[str]:
    return name.replace("-", " ").lower().split()


class Flops(NamedTuple):
    """Of one part of the network; `again` is what the backward pass computes a second time."""

    forward: float
    backward: float
    again: float = 0.0


Parts = Mapping[str, Flops]


def total(parts: Parts) -> float:
    """FLOPs of all parts."""
    return sum(sum(part) for part in parts.values())


@dataclass(frozen=True)
class Work:
    """What a forward and backward pass is asked for.

    Attributes:
        valid: positions without padding; `positions` are all B * L.
        attended: pairs of positions of which one attends to the other; `pairs` are those that are computed.
        levels: noise levels for which AdaLN is computed, B * T.
        spread: B * L * T: AdaLN's values go from levels to positions by a product.
        rows: supervised rows, by kind.
    """

    valid: int
    positions: int
    attended: int
    pairs: int
    levels: int
    spread: int
    rows: tuple[int, ...]

    @classmethod
    def of(
        cls, canvas: Canvas, rows: Sequence[Sequence[int] | Tensor], backend: str, given: Bool[Tensor, "B L"] | None
    ) -> Work:
        """Of a batch (`medim.objective.Batch`: canvas, rows, given); cheap on a CPU, a wait on a GPU.

        Args:
            backend: of attention; flash-attn and FlexAttention skip what may not attend, the others compute all pairs.
        """
        lengths = torch.bincount(canvas.study[canvas.valid])
        attended = int(lengths.square().sum())
        if given is not None:
            asked = torch.bincount(canvas.study[given & canvas.valid], minlength=len(lengths))
            attended -= int((asked * (lengths - asked)).sum())
        size, length = canvas.ids.shape
        skips = backend in ("flash_attention_2", "flex_attention")
        levels = canvas.role.shape[1] + 1
        return cls(
            valid=int(lengths.sum()),
            positions=size * length,
            attended=attended,
            pairs=attended if skips else size * length**2,
            levels=size * levels,
            spread=size * length * levels,
            rows=tuple(map(len, rows)),
        )

    def __add__(self, other: Work) -> Work:
        """Both passes."""
        numbers = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self) if f.name != "rows"}
        return Work(**numbers, rows=tuple(a + b for a, b in zip(self.rows, other.rows, strict=True)))

    def times(self, n: int) -> Work:
        """n such passes."""
        numbers = {field.name: n * getattr(self, field.name) for field in fields(self) if field.name != "rows"}
        return Work(**numbers, rows=tuple(n * count for count in self.rows))


@dataclass(frozen=True)
class Costs:
    """FLOPs of a network for a unit of each kind of work, forward.

    Attributes:
        blocks: of the linear layers of all decoder layers, a position; `blocks_backward` backward.
        attention: of scores and their use, a pair of positions, in all layers.
        fused: the backward pass of attention computes the scores again.
        time, time_backward, adaln, adaln_backward: of the time embedding and of all AdaLN layers, a noise level.
        spread: of its values, a position and level.
        recomputed: share of the blocks that gradient checkpointing computes again.
        head: D products a row and column, by kind the columns; `trained` whether the matrix gets a gradient there.
    """

    blocks: float
    blocks_backward: float
    attention: float
    fused: bool
    time: float
    time_backward: float
    adaln: float
    adaln_backward: float
    spread: float
    recomputed: float
    width: int
    columns: tuple[int, ...]
    trained: tuple[bool, ...]

    @classmethod
    def of(cls, model: MeDiMModel) -> Costs:
        """Of a network; its weights may be on the meta device or partitioned. Adapters count as they are."""
        layers = list(decoder_layers(model.backbone))
        config = model.backbone.config.get_text_config()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        linears = [m for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)]
        adaln = [one.linear for one in model.adaln if isinstance(one, AdaLN)]
        return cls(
            blocks=sum(map(_forward, linears)),
            blocks_backward=sum(map(_backward, linears)),
            attention=4.0 * len(layers) * config.num_attention_heads * head_dim,
            fused=model.attention_backend != "eager",
            time=sum(map(_forward, model.time.linears)),
            time_backward=sum(map(_backward, model.time.linears)) - _forward(model.time.linears[0]),  # none for t
            adaln=sum(map(_forward, adaln)),
            adaln_backward=sum(map(_backward, adaln)),
            spread=2.0 * 6 * config.hidden_size * len(layers),
            recomputed=sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers) / len(layers),
            width=config.hidden_size,
            columns=tuple(stop - start for start, stop in map(model.vocabulary.columns, KINDS)),
            trained=tuple(_trained(model.head, *model.vocabulary.columns(kind)) for kind in KINDS),
        )

    def needed(self, work: Work) -> dict[str, Flops]:
        """By part, what the mathematics asks for (see the top of this file)."""
        attention = self.attention * work.attended
        return {
            "blocks": Flops(self.blocks * work.valid, self.blocks_backward * work.valid),
            "attention": Flops(attention, 2 * attention),
            "AdaLN": Flops(
                (self.time + self.adaln) * work.levels, (self.time_backward + self.adaln_backward) * work.levels
            ),
            "head": self._head(work, again=False),
        }

    def computed(self, work: Work) -> dict[str, Flops]:
        """By part, what is multiplied."""
        blocks, attention, spread = self.blocks * work.positions, self.attention * work.pairs, self.spread * work.spread
        time, adaln, twice = self.time * work.levels, self.adaln * work.levels, self.recomputed
        backward = (self.time_backward + self.adaln_backward) * work.levels + spread
        return {
            "blocks": Flops(blocks, self.blocks_backward * work.positions, twice * blocks),
            "attention": Flops(attention, 2 * attention, (twice + self.fused / 2) * attention),
            "AdaLN": Flops(time + adaln + spread, backward, twice * (adaln + spread)),
            "head": self._head(work, again=True),
        }

    def _head(self, work: Work, again: bool) -> Flops:
        each = [2.0 * self.width * n * columns for n, columns in zip(work.rows, self.columns, strict=True)]
        logits = sum(n * columns for n, columns in zip(work.rows, self.columns, strict=True))
        backward = sum(one * (1 + trained) for one, trained in zip(each, self.trained, strict=True))
        return Flops(sum(each), backward, sum(each) if again and 4 * logits > heads.CHUNK_BYTES else 0.0)


def _forward(linear: nn.Linear) -> float:
    return 2.0 * linear.in_features * linear.out_features


def _backward(linear: nn.Linear) -> float:
    return _forward(linear) * (1 + linear.weight.requires_grad)


def _trained(head: Any, start: int, stop: int) -> bool:
    """Whether columns of the output matrix get a gradient; the matrix may be in blocks (`medim.model.rows`)."""
    if not hasattr(head, "intervals"):
        return bool(head.weight.requires_grad)
    return any(head.block((a, b)).requires_grad for a, b in head.intervals if max(a, start) < min(b, stop))
