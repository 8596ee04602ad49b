"""What is added to attention logits: cross-guidance gates, and what makes heads look at the same place of each image.

MedM2G (arXiv 2403.04290, section 3.3) guides the diffusers of two modalities by adaptive cross-attention. On one canvas
that attention is there already; what adapts here is its strength, learnt for each pair of modalities.
Shape letters: B batch, H heads, L canvas length, Q queries, P keys, S segments, M kinds of segments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medim.canvas import Canvas


class Marks(NamedTuple):
    """Kind (0: neither image nor text), segment (-1: none), place (0: none, `Canvas.place`) and noise level of some
    positions."""

    kind: Int[Tensor, "B Q"]
    segment: Int[Tensor, "B Q"]
    place: Int[Tensor, "B Q"]
    t: Float[Tensor, "B Q"]


class Gated(NamedTuple):
    """Queries and keys."""

    query: Marks
    key: Marks


def added(bias: Float[Tensor, "B _ Q P"], mask: Any) -> Float[Tensor, "B _ Q P"]:
    """An additive mask of sdpa or eager: the bias, and -inf where `mask` (None, bool or additive) hides a key."""
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return bias + mask


def alibi(gated: Gated, slopes: Float[Tensor, "H"], width: int) -> Float[Tensor, "B H Q P"]:
    """2-D ALiBi, within an image and across images: minus a head's slope times the distance of two codes' places.

    ALiBi is arXiv 2108.12409; on images, and across the images of two sensors, it is CROMA's (arXiv 2311.00566).
    Text and tags have no place: 0.

    Args:
        slopes: logits per code of Euclidean distance.
        width: codes in a row of an image.
    """
    rows, columns = (
        [part(ends.place - 1, width).to(slopes) for ends in gated]
        for part in (lambda p, w: torch.div(p, w, rounding_mode="floor"), torch.remainder)
    )
    distance = torch.hypot(*(a[:, :, None] - b[:, None, :] for a, b in (rows, columns)))
    placed = (gated.query.place > 0)[:, :, None] & (gated.key.place > 0)[:, None, :]
    return -slopes[:, None, None] * torch.where(placed, distance, 0.0)[:, None]


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

    def forward(self, gated: Gated, dtype: torch.dtype) -> Float[Tensor, "B 1 Q P"]:
        """The bias of each pair of a query and a key."""
        query, key = gated
        a, b = query.kind[:, :, None], key.kind[:, None, :]
        pair = self.weight[a, b]
        bias = pair[..., 0] + pair[..., 1] * (1 - key.t[:, None, :])
        other = query.segment[:, :, None] != key.segment[:, None, :]
        return torch.where(other & (a > 0) & (b > 0), bias, 0.0).to(dtype)[:, None]
