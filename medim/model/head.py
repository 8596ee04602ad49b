"""The joint head, restricted before the matmul: only some rows, and only the columns those rows can hold.

Shape letters: N selected rows, D hidden width, V joint vocabulary, C = stop - start columns.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 256 * 2**20  # logits alive at once in training, as float32


def restricted_logits(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], start: int, stop: int
) -> Float[Tensor, "N C"]:
    """Logits of N rows over columns start..stop; the product with the other columns is never made."""
    return hidden @ weight[start:stop].T


def restricted_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    start: int,
    stop: int,
) -> Float[Tensor, "N"]:
    """Cross-entropy in nats of `targets` (joint ids within start..stop) in chunks of rows.

    A chunk's logits are freed after the forward pass and made again in the backward pass, so memory is bounded by
    `CHUNK_BYTES` whatever N is.
    """

    def nll(part: Tensor, columns: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((part @ columns.T).float(), target, reduction="none")

    columns = weight[start:stop]
    size = max(1, CHUNK_BYTES // (4 * (stop - start)))
    if len(hidden) <= size:
        return nll(hidden, columns, targets - start)
    pieces = [
        checkpoint(nll, part, columns, target, use_reentrant=False)
        for part, target in zip(hidden.split(size), (targets - start).split(size), strict=True)
    ]
    return torch.cat(pieces)
