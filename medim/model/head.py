"""The joint head, restricted before the matmul: only some rows, and only the columns those rows can hold.

Shape letters: N selected rows, D hidden width, V joint vocabulary, C = stop - start columns of a group, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 256 * 2**20  # logits alive at once in training, as float32

Groups = list[tuple[int, int, int]]  # a group each: its number of rows, start, stop


def restricted_logits(
    hidden: Float[Tensor, "N D"], weight: Float[Tensor, "V D"], start: int, stop: int
) -> Float[Tensor, "N C"]:
    """Logits of N rows over columns start..stop; the product with the other columns is never made."""
    return hidden @ weight[start:stop].T


def restricted_cross_entropy(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "N"],
    start: int | Sequence[int],
    stop: int | Sequence[int],
    rows: Sequence[int] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "N"]:
    """Cross-entropy in nats of `targets` (joint ids within start..stop), float32 or wider.

    At most `CHUNK_BYTES` of logits are alive, whatever N is, and never those of all V columns. If all of them fit into
    that, their softmax is kept for the backward pass and nothing is computed twice; else they are made again there,
    chunk by chunk. Both passes take autocast's dtype for their products. There is no second derivative.

    Args:
        start, stop: the columns of all rows; or, with `rows`, G of each.
        rows: sizes of G consecutive groups of rows, which sum to N; 0 is allowed. One call with all groups makes one
            gradient [V, D], a call for each group would make G.
        softcap: c of logits c tanh(z / c) (Gemma 2, arXiv 2408.00118, section 2); None: z.

    Raises:
        ValueError: groups that do not fit the rows, or columns that do not fit the weight.
    """
    groups = check_groups(len(hidden), len(weight), start, stop, rows)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    keep = wanted and sum(n * (b - a) for n, a, b in groups) * 4 <= CHUNK_BYTES
    chunks = list(_chunks(groups))
    return _RestrictedCrossEntropy.apply(hidden, weight, targets, chunks, dtype, keep, softcap)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits as the backbone's own head bounds them."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class RestrictedHead(nn.Linear):
    """The output matrix [V, D] as a module, without bias; all of its uses go through `forward`.

    That matters where the weight is partitioned: ZeRO-3 and FSDP gather it by hooks around a module's forward and
    backward pass, so that code which takes `head.weight` outside sees an empty or a partial tensor. For the same reason
    a process without any row must still call it: the others wait for it.

    peft: name it in `modules_to_save` to train it. It cannot be a LoRA target: an adapter adds logits of all V columns.
    With `ensure_weight_tying` peft puts a plain nn.Linear into its wrapper's `modules_to_save`: replace that by
    `from_linear` of it.
    """

    softcap: float | None = None  # of the backbone's config: see `restricted_cross_entropy`

    def __init__(
        self,
        in_features: int,
        out_features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> RestrictedHead:
        """The same Parameter (and so the same tie to the input embeddings) as a restricted head.

        Raises:
            ValueError: the layer has a bias.
        """
        if linear.bias is not None:
            raise ValueError("a restricted head has no bias, this layer has one")
        size, width = linear.weight.shape
        head = cls(width, size, device="meta")
        head.weight = linear.weight
        return head.train(linear.training)

    def forward(
        self,
        hidden: Float[Tensor, "*rows D"],
        targets: Int[Tensor, "N"] | None = None,
        start: int | Sequence[int] | None = None,
        stop: int | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """What the arguments ask for.

        - ``head(hidden[..., D])``: all logits [..., V].
        - ``head(hidden[N, D], start=a, stop=b)``: `restricted_logits` [N, C].
        - ``head(hidden[N, D], targets[N], a, b)``: `restricted_cross_entropy` [N]; with `rows`, of several groups.

        Raises:
            ValueError: start without stop or the reverse; targets without columns; what `restricted_cross_entropy`
                raises.
        """
        if start is None and stop is None and targets is None:
            return capped(super().forward(hidden), self.softcap)
        if start is None or stop is None:
            raise ValueError("columns are start and stop: give both")
        if targets is not None:
            return restricted_cross_entropy(hidden, self.weight, targets, start, stop, rows, self.softcap)
        if not isinstance(start, int) or not isinstance(stop, int) or rows is not None:
            raise ValueError("logits are of one group: start and stop are integers, and rows is left out")
        return capped(restricted_logits(hidden, self.weight, start, stop), self.softcap)


def check_groups(
    n: int, size: int, start: int | Sequence[int], stop: int | Sequence[int], rows: Sequence[int] | None
) -> Groups:
    """Start, stop and rows in one form, checked."""
    starts, stops = ([one] if isinstance(one, int) else list(one) for one in (start, stop))
    counts = [n] if rows is None else list(rows)
    if not len(starts) == len(stops) == len(counts):
        raise ValueError(f"{len(starts)} starts, {len(stops)} stops, {len(counts)} groups of rows: as many of each")
    if sum(counts) != n or min(counts, default=0) < 0:
        raise ValueError(f"groups of {counts} rows: they must sum to {n}")
    for a, b in zip(starts, stops, strict=True):
        if not 0 <= a < b <= size:
            raise ValueError(f"columns {a}..{b} of a weight with {size} rows")
    return list(zip(counts, starts, stops, strict=True))


def _chunks(groups: Groups) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each chunk: no more rows of a group than `CHUNK_BYTES` has room for."""
    first = 0
    for count, start, stop in groups:
        size = max(1, CHUNK_BYTES // (4 * (stop - start)))
        for begin in range(first, first + count, size):
            yield slice(begin, min(begin + size, first + count)), slice(start, stop)
        first += count


def _chunk(
    hidden: Float[Tensor, "n D"], columns: Float[Tensor, "C D"], targets: Int[Tensor, "n"], softcap: float | None
) -> tuple[Float[Tensor, "n"], Float[Tensor, "n C"]]:
    """Cross-entropy, and its derivative by the products: softmax minus one-hot, in the place of the logits."""
    p = (hidden @ columns.T).to(torch.promote_types(hidden.dtype, torch.float32))
    slope = None
    if softcap is not None:
        p = capped(p, softcap)
        slope = 1 - (p / softcap).square()  # of the cap
    index = targets.unsqueeze(1)
    aimed, top = p.gather(1, index), p.amax(1, keepdim=True)
    total = p.sub_(top).exp_().sum(1, keepdim=True)
    p.div_(total)
    p.scatter_(1, index, p.gather(1, index) - 1)
    if slope is not None:
        p *= slope
    return (total.log() + top - aimed).squeeze(1), p.to(hidden.dtype)


class _RestrictedCrossEntropy(torch.autograd.Function):
    """`restricted_cross_entropy`; the row's upstream gradient is applied to [n, D], never to [n, C]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunks: list[tuple[slice, slice]],
        dtype: torch.dtype,
        keep: bool,
        softcap: float | None,
    ) -> Tensor:
        ctx.chunks, ctx.dtype, ctx.softcap = chunks, dtype, softcap
        nll, kept = [hidden.new_zeros(0, dtype=torch.promote_types(dtype, torch.float32))], []
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, columns in chunks:
                part, p = _chunk(
                    hidden[rows].to(dtype), weight[columns].to(dtype), targets[rows] - columns.start, softcap
                )
                nll.append(part)
                if keep:
                    kept.append(p)
                del p
        ctx.save_for_backward(hidden, weight, targets, *kept)
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None, None]:
        hidden, weight, targets, *kept = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if to_hidden else None
        grad_weight = torch.zeros_like(weight) if to_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for number, (rows, columns) in enumerate(ctx.chunks):
                h, w = hidden[rows].to(ctx.dtype), weight[columns].to(ctx.dtype)
                p = kept[number] if kept else _chunk(h, w, targets[rows] - columns.start, ctx.softcap)[1]
                scale = upstream[rows].unsqueeze(1)
                if grad_hidden is not None:
                    grad_hidden[rows] = (p @ w) * scale
                if grad_weight is not None:
                    scaled = (h * scale).to(ctx.dtype)
                    if weight.dtype == ctx.dtype:
                        grad_weight[columns].addmm_(p.T, scaled)
                    else:
                        grad_weight[columns] += p.T @ scaled
        return grad_hidden, grad_weight, None, None, None, None, None
