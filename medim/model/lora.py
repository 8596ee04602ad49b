"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a frozen backbone, by peft.

A projection becomes ``W x + alpha / rank * B (A x)`` with B = 0 at the start. What is new to the backbone is trained in
full: AdaLN, the time MLP, the places, and the rows of codes and tags (`medim.model.rows`). QLoRA (Dettmers et al. 2023,
arXiv 2305.14314) keeps the frozen projections in 4 or 8 bits.

The plain model has other parameter names: `plain_name` maps. A unit is filled in three steps, together or module by
module: what has a plain name is read, factors are drawn (`draw_factor`), then `quantise` is called.
"""

from __future__ import annotations

import difflib
import math
import re
import zlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from medim.config import options
from medim.errors import UserError
from medim.model.backbone import decoder_layers
from medim.model.rows import Interval, joined, split_rows
from medim.vocabulary import Vocabulary

if TYPE_CHECKING:
    from medim.model.medim import MeDiMModel

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
# of MeDiM's own parameters: all that are not the backbone's
IN_FULL = ("adaln.", "time.", "place.", "belongs.", "embedder.", "gates.")
_FACTOR = re.compile(r"(.+)\.lora_([AB])\.default\.weight")
_ROWS = re.compile(r"(.+)\.rows_(\d+)_(\d+)")


@options
class LoraOptions:
    """Adapters instead of all weights.

    Attributes:
        rank: of the factors A and B; 0 trains all weights, without adapters.
        alpha: factors are scaled by alpha / rank.
        dropout: of what goes into A.
        targets: names of the decoder layers' projections that get adapters.
        rows: which rows of both vocabulary tables are trained in full: those of image codes and tags, of tags only
            (for a backbone that knows the codes), or none.
        bits: of the frozen target projections: 4 (nf4) or 8 by bitsandbytes; 0 keeps them as they are.
        frozen: type of the frozen matrices; bf16 takes half the memory.
    """

    rank: Annotated[int, Field(ge=0)] = 0
    alpha: Annotated[float, Field(gt=0)] = 32.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = PROJECTIONS
    rows: Literal["codes", "tags", "none"] = "codes"
    bits: Literal[0, 4, 8] = 0
    frozen: Literal["fp32", "bf16"] = "fp32"


class Adapted(NamedTuple):
    """What a model with adapters remembers.

    Attributes:
        base: the folder of the model that they are trained over; as the user named it.
        fingerprint: of its weights (`medim.model.adapters.fingerprint`); empty: unknown.
    """

    options: LoraOptions
    base: str
    fingerprint: str = ""


class Plain(NamedTuple):
    """A parameter of the plain model, or the rows start..stop of one; stop None: all of it."""

    name: str
    start: int = 0
    stop: int | None = None


def plain_name(name: str) -> Plain | None:
    """What a parameter of a model with adapters is in the plain one; None: a factor, which it has not.

    >>> plain_name("backbone.lm_head.rows_512_1033")
    Plain(name='backbone.lm_head.weight', start=512, stop=1033)
    >>> plain_name("backbone.model.layers.0.mlp.up_proj.base_layer.weight")
    Plain(name='backbone.model.layers.0.mlp.up_proj.weight', start=0, stop=None)
    >>> plain_name("backbone.model.layers.0.mlp.up_proj.lora_A.default.weight")
    """
    if _FACTOR.fullmatch(name):
        return None
    if match := _ROWS.fullmatch(name):
        return Plain(f"{match[1]}.weight", int(match[2]), int(match[3]))
    return Plain(name.replace(".base_layer.", "."))


def trained_rows(vocabulary: Vocabulary, rows: Literal["codes", "tags", "none"]) -> list[Interval]:
    """The rows of the vocabulary's tables that are trained in full."""
    if rows == "none":
        return []
    tags = [(i, i + 1) for i in vocabulary.tags.values()]
    return joined([vocabulary.image, *tags] if rows == "codes" else tags)


def trained_names(model: MeDiMModel, o: LoraOptions) -> set[str]:
    """Names of what is trained once a plain model has adapters."""
    named = {id(value): name for name, value in reversed(list(model.named_parameters()))}  # of a tie the first
    names = {name for name in named.values() if name.startswith(IN_FULL)}
    for table in (model.get_input_embeddings(), model.backbone.get_output_embeddings()):
        name = named[id(table.weight)].removesuffix("weight")
        names |= {f"{name}rows_{start}_{stop}" for start, stop in trained_rows(model.vocabulary, o.rows)}
    layers = {id(module) for module in decoder_layers(model.backbone).modules()}
    for name, module in model.named_modules():
        if id(module) in layers and name.rsplit(".", 1)[-1] in o.targets:
            names |= {f"{name}.lora_{factor}.default.weight" for factor in "AB"}
    return names


def add_lora(model: MeDiMModel, o: LoraOptions, seed: int = 0, base: str = "", fingerprint: str = "") -> None:
    """Give a model adapters and freeze the rest; its class, hooks and outputs stay as they are.

    Weights may be on the meta device; then `draw_factor` and `quantise` are left to who fills them.

    Args:
        seed: of the factors A.
        base, fingerprint: as in `Adapted`.

    Raises:
        UserError: rank below 1, targets that the backbone lacks, a model that has adapters, or a missing package.
    """
    if o.rank < 1:
        raise UserError(f"lora.rank={o.rank}: adapters have a rank of at least 1")
    if model.lora is not None:
        raise UserError(f"the model has adapters over {model.lora.base} already; merge them first: medim merge")
    _check_targets(model, o.targets)
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("lora.rank: adapters need peft: pip install peft") from error
    meta = next(model.parameters()).is_meta
    if o.bits and not meta:
        import_bitsandbytes(o.bits)
    if meta:
        model.tie_weights()  # a skeleton has lost its ties
    expected = trained_names(model, o)
    config = LoraConfig(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=list(o.targets))  # type: ignore[arg-type]
    inject_adapter_in_model(config, model.backbone, low_cpu_mem_usage=meta)
    if trained := trained_rows(model.vocabulary, o.rows):
        split_rows(model.backbone, trained)
    found = set()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in expected)
        if name in expected:
            found.add(name)
            if not meta:
                draw_factor(name, parameter, seed)
    assert found == expected, sorted(found ^ expected)[:3]
    if o.frozen == "bf16":
        _shrink(model)
    model.lora = Adapted(o, base, fingerprint)
    if not meta:
        quantise(model, o.bits)


def _check_targets(model: MeDiMModel, targets: tuple[str, ...]) -> None:
    named = decoder_layers(model.backbone).named_modules()
    known = sorted({name.rsplit(".", 1)[-1] for name, module in named if isinstance(module, nn.Linear)})
    if not targets:
        raise UserError(f"lora.targets: names none of {', '.join(known)}")
    for target in targets:
        if target not in known:
            close = difflib.get_close_matches(target, known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"it has {', '.join(known)}"
            raise UserError(f"lora.targets: the backbone has no projection {target!r}, {hint}")


@torch.no_grad()
def draw_factor(name: str, parameter: Tensor, seed: int) -> None:
    """Fill a factor of this name, a pure function of (seed, name): A as `nn.Linear` is, B with zeros.

    Other parameters are left as they are.
    """
    match = _FACTOR.fullmatch(name)
    if match is None:
        return
    if match[2] == "B":
        parameter.zero_()
        return
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
    value = torch.empty(parameter.shape)
    parameter.copy_(nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=generator))


class _Frozen(nn.Linear):
    """A frozen projection in bf16. Outside autocast its output has the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias).to(x.dtype)


def _shrink(model: MeDiMModel) -> None:
    """Frozen matrices in bf16; norms stay as they are."""
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.dim() > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
    for module in decoder_layers(model.backbone).modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.__class__ = _Frozen


def quantise(module: nn.Module, bits: int) -> None:
    """Store the frozen projections under `module` that have adapters in so many bits; 0: nothing is done.

    bitsandbytes multiplies in bf16 on a GPU, and in the type of the input elsewhere.
    """
    if not bits:
        return
    nn_of = import_bitsandbytes(bits)
    for layer in list(module.modules()):
        base = getattr(layer, "base_layer", None)
        if not isinstance(base, nn.Linear) or hasattr(base.weight, "quant_state") or hasattr(base.weight, "CB"):
            continue
        width, size, device = base.in_features, base.out_features, base.weight.device
        weight = base.weight.data
        if bits == 4:
            dtype = torch.bfloat16 if device.type == "cuda" else None
            small = nn_of.Linear4bit(
                width, size, bias=base.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
            )
            small.support_avx512bf16_for_cpu = False  # evaluated, it would repack weights for good
            small.weight = nn_of.Params4bit(weight, requires_grad=False, quant_type="nf4", module=small)
        else:
            small = nn_of.Linear8bitLt(width, size, bias=base.bias is not None, has_fp16_weights=False, device="meta")
            small.weight = nn_of.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        small.bias = base.bias
        layer.base_layer = small.to(device)


def import_bitsandbytes(bits: int) -> Any:
    """The layers of bitsandbytes.

    Raises:
        UserError: it is not installed; names the setting that needs it.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"lora.bits={bits}: bitsandbytes is not installed: pip install bitsandbytes") from error
    return bitsandbytes.nn


def check_sharing(o: LoraOptions, sharing: str, whole: bool) -> None:
    """Refuse what cannot be shared out: matrices of a few bits, and weights of two types in one unit.

    Args:
        sharing: how processes share the model, as messages call it: ``ZeRO-3``.
        whole: each process holds all weights.

    Raises:
        UserError: such a model, and `whole` is false.
    """
    if o.rank and not whole:
        for name, value, usual in (("bits", o.bits, 0), ("frozen", o.frozen, "fp32")):
            if value != usual:
                raise UserError(
                    f"lora.{name}={value} cannot be used with {sharing}, which divides each matrix among processes: "
                    f"set lora.{name}={usual}, or launch with configs/accelerate/ddp.yaml"
                )
