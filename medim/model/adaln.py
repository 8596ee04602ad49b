"""Diffusion time as adaptive layer norm (AdaLN; Peebles & Xie 2023, arXiv 2212.09748), for any pre-norm decoder layer.

Shape letters: B batch, L canvas length, D hidden width, T noise levels a row (one a segment, or one a position).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class TimeEmbedding(nn.Module):
    """Noise level in [0, 1] -> scaled sinusoid -> MLP of width `dim` (DiT section 3; t is scaled to [0, 1000])."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU())

    @property
    def linears(self) -> list[nn.Linear]:
        """The two layers of the MLP."""
        return [layer for layer in self.mlp if isinstance(layer, nn.Linear)]

    def forward(self, t: Float[Tensor, "B T"]) -> Float[Tensor, "B T E"]:
        exponent = torch.arange(self.dim // 2, dtype=torch.float32, device=t.device) / (self.dim // 2)
        angles = 1000 * t.float().unsqueeze(-1) * torch.exp(-math.log(10_000) * exponent)
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

    def reset(self) -> None:
        """Make the layer the pretrained one."""
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def attach(self, layer: nn.Module) -> None:
        """Hook a pre-norm decoder layer (Llama's names: input_layernorm, self_attn, post_attention_layernorm, mlp).

        The layer then takes two more keywords: ``time`` [B, T, E] and ``level`` [B, L], which time a position has
        (None: T = L, each its own).

        Raises:
            TypeError: the layer lacks one of the four branches.
        """
        branches = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
        missing = [name for name in branches if not isinstance(getattr(layer, name, None), nn.Module)]
        if missing:
            raise TypeError(f"{type(layer).__name__} is no pre-norm decoder layer: it has no {', '.join(missing)}")
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
        getattr(layer, branches[0]).register_forward_pre_hook(start)
        for name, hook in zip(branches, (norm, gate, norm, gate), strict=True):
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
