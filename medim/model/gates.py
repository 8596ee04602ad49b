"""Cross-guidance: how strongly the segments of a study attend to each other, learnt for each pair of modalities.

MedM2G (arXiv 2403.04290, section 3.3) guides the diffusers of two modalities by adaptive cross-attention. On one canvas
that attention is there already; what adapts here is its strength.
Shape letters: B batch, L canvas length, Q queries, P keys, S segments, M kinds of segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medim.canvas import Canvas


class Gated(NamedTuple):
    """Kind (0: neither image nor text), segment (-1: none) of queries and keys, and the noise levels of keys."""

    query_kind: Int[Tensor, "B Q"]
    query_segment: Int[Tensor, "B Q"]
    key_kind: Int[Tensor, "B P"]
    key_segment: Int[Tensor, "B P"]
    key_t: Float[Tensor, "B P"]


class CrossGates(nn.Module):
    """A bias of attention logits from a segment of kind a to another of kind b: w_ab + v_ab (1 - t_b).

    So exp(bias) multiplies the weight of what is attended to: a gate that opens as the other segment becomes clear. It
    is 0 within a segment, to tags, and everywhere at the start. Kinds are text and the tags of the modalities.

    Attributes:
        weight: [M, M, 2], w and v; M is 2 more than the vocabulary has tags.
    """

    def __init__(self, tags: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(tags + 2, tags + 2, 2))

    @staticmethod
    def kinds(canvas: Canvas) -> Int[Tensor, "B L"]:
        """The kind of each position: 0 at tags and padding, 1 text, 1 + the number of the modality's tag at codes."""
        first = canvas.tags[..., 0] if canvas.tags.shape[-1] else torch.zeros_like(canvas.role)
        by_segment = torch.where(canvas.role < 0, 0, 1 + first)
        return torch.where(canvas.segment < 0, 0, by_segment.gather(1, canvas.segment.clamp(min=0)))

    def forward(self, gated: Gated, mask: Any, dtype: torch.dtype) -> Float[Tensor, "B 1 Q P"]:
        """An additive mask of sdpa or eager: the gates, and -inf where `mask` (None, bool or additive) hides a key."""
        a, b = gated.query_kind[:, :, None], gated.key_kind[:, None, :]
        pair = self.weight[a, b]
        bias = pair[..., 0] + pair[..., 1] * (1 - gated.key_t[:, None, :])
        other = gated.query_segment[:, :, None] != gated.key_segment[:, None, :]
        bias = torch.where(other & (a > 0) & (b > 0), bias, 0.0).to(dtype)[:, None]
        if mask is None:
            return bias
        if mask.dtype == torch.bool:
            return bias.masked_fill(~mask, torch.finfo(dtype).min)
        return bias + mask
