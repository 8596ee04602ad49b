"""Bytes that training needs on each GPU, by kind, counted without allocating any of them.

What lasts between steps is a sum over parameters. What the backward pass needs is counted by running one and two
decoder layers on fake tensors (torch's FakeTensorMode: shapes and types without memory) for one and two rows, and by
asking autograd what it saves; bytes are linear in both. What the allocator wastes and the driver takes is not counted.

Shape letters: L canvas length, T noise levels a row, D hidden width, V joint vocabulary, N supervised rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from medim.errors import UserError
from medim.model import head as heads
from medim.model.backbone import decoder_layers
from medim.model.gates import Gated, Marks
from medim.model.medim import MeDiMModel
from medim.training.optimizer import muon_matrices
from medim.training.sizes import Masking, Sizes
from medim.vocabulary import KINDS

GIB = 2**30
# DeepSpeed's defaults, in elements; configs/deepspeed/ leaves them as they are
BUCKET = 500_000_000  # reduce_bucket_size
LIVE = 1_000_000_000  # stage3_max_live_parameters, stage3_max_reuse_distance
SMALL = 4096  # bitsandbytes keeps the moments of smaller tensors in 32 bits
Bytes = dict[str, float]


@dataclass(frozen=True)
class Sharing:
    """How GPUs share a model.

    Attributes:
        zero: 0 is DDP or one GPU; 1 shares the optimizer out, 2 gradients too, 3 weights too (FSDP2 is much the same).
        offload: what is shared out is kept by the host, as in configs/deepspeed/zero3_offload.json.

    Raises:
        UserError: there is nothing that could be offloaded.
    """

    gpus: int = 1
    zero: int = 0
    offload: bool = False

    def __post_init__(self) -> None:
        if self.offload and self.zero != 3:
            raise UserError("--offload: the host keeps what ZeRO-3 shares out; add --zero 3")


def lasting(model: nn.Module, sharing: Sharing, optimizer: str, bf16: bool, bits: int = 0) -> tuple[Bytes, Bytes]:
    """Bytes between steps, of a GPU and of the host for each GPU: weights, gradients, moments, average, buffers.

    Gradients are counted although a step begins without them: with accumulation they are there while a pass runs.

    Args:
        model: float32, or in the types that frozen weights are kept in; on the meta device.
        optimizer, bits: as `TrainOptions` and `LoraOptions` have them.
    """
    own = {id(p): p for p in model.parameters()}.values()
    trained = [p for p in own if p.requires_grad]
    n, frozen = sum(p.numel() for p in trained), [p for p in own if not p.requires_grad]
    moments = sum(2.0 * p.numel() * (1 + 4 / 256 if p.numel() >= SMALL else 4) for p in trained)
    moments = moments if optimizer == "adamw_8bit" else 8.0 * n
    if optimizer == "muon":  # one moment instead of two
        moments -= 4.0 * sum(p.numel() for p in muon_matrices(model))
    quantised = _quantised(model, bits) if bits else {}
    kept = sum(float(quantised.get(id(p), p.numel() * p.element_size())) for p in frozen)
    if not sharing.zero:
        found = {"weights": kept + 4.0 * n, "gradients": 4.0 * n, "optimizer": moments, "EMA": 4.0 * n}
        return found | ({"buckets": 4.0 * n} if sharing.gpus > 1 else {}), {}
    size, each = 2.0 if bf16 else 4.0, 1 / sharing.gpus
    found = {
        "weights": size * (n + sum(p.numel() for p in frozen)) * (each if sharing.zero == 3 else 1),
        "gradients": size * n * (each if sharing.zero >= 2 else 1),
        "master weights": 4 * n * each,
        "optimizer": moments * each,
        "EMA": 4 * n * each,
        "buckets": size * BUCKET * (2 if sharing.zero == 2 else 1),
    }
    if sharing.offload:
        away = ("weights", "gradients", "master weights", "optimizer", "EMA")
        return {"buckets": found["buckets"]}, {kind: found[kind] for kind in away}
    return found, {}


def _quantised(model: nn.Module, bits: int) -> dict[int, float]:
    """Bytes of frozen projections with adapters: nf4 with its scales quantised once more, or 8 bits with one a row."""
    found: dict[int, float] = {}
    for module in model.modules():
        base = getattr(module, "base_layer", None)
        if isinstance(base, nn.Linear):
            n = base.weight.numel()
            scales = n / 64 + 4 * n / 64 / 256 if bits == 4 else 4.0 * base.out_features
            found[id(base.weight)] = n * bits / 8 + scales
    return found


def gathered(model: nn.Module, sharing: Sharing, bf16: bool) -> float:
    """Bytes of the weights that ZeRO-3 has whole while a pass runs: DeepSpeed keeps what is soon used again."""
    if sharing.zero != 3:
        return 0.0
    sizes = {id(p): p.numel() for p in model.parameters()}
    return float(min(sum(sizes.values()), LIVE + max(sizes.values())) * (2 if bf16 else 4))


class Saved(NamedTuple):
    """Bytes that the forward pass of the decoder leaves for the backward pass.

    Attributes:
        row: for a row of the canvas.
        fixed: whatever the rows: under autocast, copies of the weights in bf16.
        block: for a row, of one block that is not computed again.
        copies: of the weights of a block that is computed again, in bf16.
        again: some blocks are.
    """

    row: float
    fixed: float
    block: float
    copies: float
    again: bool


def saved(model: MeDiMModel, sizes: Sizes, bf16: bool) -> Saved:
    """What the backward pass of the decoder needs, with gradient checkpointing as the layers are set to it.

    Args:
        model: as it is run: in bf16 under ZeRO, else float32 or partly frozen in bf16; on the meta device.
        bf16: the pass runs under autocast.
    """
    layers = list(decoder_layers(model.backbone))
    again = sum(bool(getattr(layer, "gradient_checkpointing", False)) for layer in layers)
    plain = _block(model, sizes, bf16, False)
    rest_row, rest_fixed = plain.rest
    row, fixed = plain.row * (len(layers) - again), plain.fixed * (len(layers) - again)
    if not again:
        return Saved(row + rest_row, fixed + rest_fixed, plain.row, 0.0, False)
    kept = _block(model, sizes, bf16, True)
    if bf16:  # autocast keeps its copies of trained weights until the forward pass ends
        fixed += again * sum(
            2.0 * m.weight.numel()
            for m in (*layers[0].modules(), *model.adaln[0].modules())
            if isinstance(m, nn.Linear) and m.weight.requires_grad and m.weight.dtype == torch.float32
        )
    return Saved(
        row + kept.row * again + rest_row, fixed + kept.fixed * again + rest_fixed, plain.row, plain.fixed, True
    )


class _Block(NamedTuple):
    row: float
    fixed: float
    rest: tuple[float, float]  # of what is not in blocks: a row, and fixed


def _block(model: MeDiMModel, sizes: Sizes, bf16: bool, again: bool) -> _Block:
    """Bytes of a block, from one and two layers and rows."""
    one, two = ([float(_run(model, sizes, bf16, again, n, rows)) for rows in (1, 2)] for n in (1, 2))
    row = (two[1] - two[0]) - (one[1] - one[0])
    fixed = (two[0] - one[0]) - row
    rest_row = one[1] - one[0] - row
    return _Block(row, fixed, (rest_row, one[0] - row - fixed - rest_row))


def _run(model: MeDiMModel, sizes: Sizes, bf16: bool, again: bool, layers: int, rows: int) -> int:
    """Bytes that autograd saves while some layers run for some rows; weights themselves are not counted."""
    length = sizes.length
    with _shortened(model, layers, again), FakeTensorMode(allow_non_fake_inputs=True):
        weights: dict[str, Tensor] = {
            name: nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
            for name, p in model.named_parameters()
        }
        own = {value.untyped_storage()._cdata for value in weights.values()}
        found: dict[int, Tensor] = {}

        def pack(value: Tensor) -> Tensor:
            if value.untyped_storage()._cdata not in own:
                found[value.untyped_storage()._cdata] = value
            return value

        ids = torch.zeros(rows, length, dtype=torch.long)
        marks = Marks(ids, ids, ids, ids.float())
        arguments = {
            "attention_mask": _mask(sizes.masking, rows, length),
            "position_ids": ids if sizes.pack else None,
            "place": ids,
            "gated": Gated(marks, marks) if model.slopes or model.gates is not None else None,
        }
        asked = (ids, torch.zeros(rows, sizes.levels), ids)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            functional_call(model, weights, asked, arguments)
        return sum(value.untyped_storage().nbytes() for value in found.values())


def _mask(masking: Masking, rows: int, length: int) -> Tensor | None:
    if masking == "none":
        return None
    return torch.ones(rows, 1, 1 if masking == "keys" else length, length, dtype=torch.bool)


@contextmanager
def _shortened(model: MeDiMModel, layers: int, again: bool) -> Iterator[None]:
    """The first so many layers only, in training, checkpointed or not, with an attention that runs on a CPU."""
    decoder, config = model.backbone.get_decoder(), model.backbone.config
    whole, training, backend = decoder.layers, model.training, config._attn_implementation
    flags = [getattr(layer, "gradient_checkpointing", False) for layer in whole]
    try:
        decoder.layers = nn.ModuleList(list(whole)[:layers])
        for layer in decoder.layers:
            layer.gradient_checkpointing = again
        if backend not in ("eager", "sdpa"):  # these save what sdpa does: queries, keys, values, outputs
            config._attn_implementation = "sdpa"
        model.train()
        yield
    finally:
        decoder.layers, config._attn_implementation = whole, backend
        for layer, flag in zip(whole, flags, strict=True):
            layer.gradient_checkpointing = flag
        model.train(training)


def head_bytes(model: MeDiMModel, scored: Sequence[int], bf16: bool) -> tuple[float, float]:
    """Bytes that the head keeps for the backward pass, and those of the logits that it has at once beside.

    Args:
        scored: supervised rows of a pass, by kind.
    """
    weight = next(iter(model.head.parameters()))
    size = 2 if bf16 else weight.element_size()
    columns = [stop - start for start, stop in map(model.vocabulary.columns, KINDS)]
    logits = [n * c for n, c in zip(scored, columns, strict=True)]
    keeps = 4 * sum(logits) <= heads.CHUNK_BYTES
    stream = weight.element_size()  # of hidden states: they have the type of the embeddings
    kept = sum(scored) * (model.backbone.config.get_text_config().hidden_size * stream + 16)
    kept += sum(logits) * size if keeps else 0
    chunks = [
        min(n, max(1, heads.CHUNK_BYTES // (4 * c))) * c * (4 + (size if size < 4 else 0))
        for n, c in zip(scored, columns, strict=True)
    ]
    cast = max(columns) * weight.shape[1] * size if size != weight.element_size() else 0
    return float(kept), float(max(chunks) + cast)
