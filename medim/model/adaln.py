"""Diffusion time as adaptive layer norm (AdaLN; Peebles & Xie 2023, arXiv 2212.09748), for any pre-norm decoder layer.

Shape letters: B batch, L canvas length, D hidden width, T noise levels a row (one a segment, or one a position).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medim.config import options
from medim.errors import UserError

PRE_NORM = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
SANDWICH = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
AdaLNStart = Literal["identity", "random"]
SIGMA_EPS = 1e-3  # MDLM's log-linear schedule never masks everything


@options
class TimeOptions:
    """How a noise level becomes what AdaLN takes; the defaults are ours, others those of a foreign checkpoint.

    Attributes:
        frequencies: width of the sinusoid; 0: that of the MLP.
        of: what the sinusoid is of: the level t, times 1000, or MDLM's total noise sigma = -log(1 - (1 - eps) t).
        activated: whether the MLP ends in SiLU.
        shared: all positions of a row are told the row's highest level, given ones too.
    """

    frequencies: int = 0
    of: Literal["level", "sigma"] = "level"
    activated: bool = True
    shared: bool = False


class TimeEmbedding(nn.Module):
    """Noise level in [0, 1] -> scaled sinusoid -> MLP of width `dim` (DiT section 3; t is scaled to [0, 1000])."""

    def __init__(self, dim: int, o: TimeOptions | None = None) -> None:
        super().__init__()
        self.o = o or TimeOptions()
        self.width = self.o.frequencies or dim
        last = [nn.SiLU()] if self.o.activated else []
        self.mlp = nn.Sequential(nn.Linear(self.width, dim), nn.SiLU(), nn.Linear(dim, dim), *last)

    @property
    def linears(self) -> list[nn.Linear]:
        """The two layers of the MLP."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, t: Float[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        exponent = torch.arange(self.width // 2, dtype=torch.float32, device=t.device) / (self.width // 2)
        value = 1000 * t.float() if self.o.of == "level" else -torch.log1p(-(1 - SIGMA_EPS) * t.float())
        angles = value.unsqueeze(-1) * torch.exp(-math.log(10_000) * exponent)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.linears[0].weight.dtype))


class AdaLN(nn.Module):
    """Shift, scale and gate for the two branches of one decoder layer.

    ``norm(x) * (1 + scale) + shift`` and ``x + (1 + gate) * branch(x)``: all six are zero at the start, where the layer
    is the pretrained one exactly. It is attached to the layer by forward hooks, so the layer keeps its class, its
    parameter names and its own forward.
    """

    def __init__(self, dim: int, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 6 * hidden_size)
        self.reset()

    def reset(self, start: AdaLNStart = "identity") -> None:
        """Make the layer the pretrained one, or draw it as MeDiM's authors do: their gate multiplies the branch itself
        and is drawn about 0, which is a bias of -1 to ours.
        """
        nn.init.zeros_(self.linear.bias)
        if start == "identity":
            nn.init.zeros_(self.linear.weight)
            return
        nn.init.normal_(self.linear.weight, std=0.02)
        with torch.no_grad():
            self.linear.bias.view(2, 3, -1)[:, 2] = -1.0

    def attach(self, layer: nn.Module) -> None:
        """Hook a pre-norm decoder layer (Llama's names), or one with norms around each branch (Gemma 2 and 3).

        The layer then takes two more keywords: ``time`` [B, T, E] and ``level`` [B, L], which time a position has
        (None: T = L, each its own).

        Raises:
            UserError: the layer is of another kind.
        """
        hooked = hooked_modules(layer)
        now: dict[str, Any] = {}  # made and dropped inside the layer's forward: checkpointing keeps none of it

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            kwargs = dict(kwargs)
            now["asked"] = kwargs.pop("time"), kwargs.pop("level")
            return args, kwargs

        def start(module: nn.Module, args: Any) -> None:
            now["values"] = list(self.modulation(*now["asked"]))

        def norm(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            shift, scale = now["values"].pop(0), now["values"].pop(0)
            return output * (1 + scale) + shift

        def gate(module: nn.Module, args: Any, output: Any) -> Any:
            factor = 1 + now["values"].pop(0)
            return (output[0] * factor, *output[1:]) if isinstance(output, tuple) else output * factor

        layer.register_forward_pre_hook(enter, with_kwargs=True)
        getattr(layer, hooked[0]).register_forward_pre_hook(start)
        for name, hook in zip(hooked, (norm, gate, norm, gate), strict=True):
            getattr(layer, name).register_forward_hook(hook)

    def modulation(
        self, time: Float[Tensor, "B T E"], level: Int[Tensor, "B L"] | None
    ) -> tuple[Float[Tensor, "B L D"], ...]:
        """Six tensors: shift, scale, gate of attention, then of the MLP; computed once a level, then spread."""
        values = self.linear(time)
        if level is None:
            return values.chunk(6, dim=-1)
        one_hot = torch.nn.functional.one_hot(level, values.shape[1]).to(values.dtype)
        return (one_hot @ values).chunk(6, dim=-1)  # a product, since the gradient of gather adds row by row


def hooked_modules(layer: nn.Module) -> tuple[str, ...]:
    """The modules of a decoder layer that begin and end its two branches, in the order in which they run.

    Raises:
        UserError: a layer whose norms follow its branches, or that has none, or more: AdaLN has no place there.
    """
    names = {name for name, _ in layer.named_children()}
    norms = {name for name in names if "norm" in name}
    for modules, known in ((SANDWICH, set(SANDWICH)), (PRE_NORM, {PRE_NORM[0], PRE_NORM[2]})):
        if norms == known and {"self_attn", "mlp"} <= names and "Swin" not in type(layer).__name__:
            return modules
    missing = [name for name in PRE_NORM if name not in names]
    why = (
        f"it has no {', '.join(missing)}"
        if missing
        else f"its norms are {', '.join(sorted(norms))}, or in other places"
    )
    raise UserError(f"{type(layer).__name__} is no pre-norm decoder layer: {why}; AdaLN cannot be attached to it")
