"""A vocabulary's table as blocks of rows, each a Parameter of its own: some are trained, the others frozen.

So the optimizer keeps no state for frozen rows, and no matrix is cut or grown while ZeRO-3 or FSDP has its parts. A
block is called ``rows_START_STOP``, which says where in the whole table it lies.

Shape letters: N selected rows, D hidden width, V joint vocabulary, C columns of a group.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medim.errors import UserError
from medim.model.head import capped, check_groups, restricted_cross_entropy

Interval = tuple[int, int]


def joined(intervals: Sequence[Interval]) -> list[Interval]:
    """The same rows as the fewest intervals, in order."""
    found: list[Interval] = []
    for start, stop in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((start, stop))
    return found


class SplitTable(nn.Module):
    """Blocks of rows of a table [V, D]."""

    def __init__(self, blocks: dict[Interval, nn.Parameter]) -> None:
        super().__init__()
        self.intervals = tuple(blocks)
        for interval, block in blocks.items():
            self.register_parameter(_name(interval), block)

    def block(self, interval: Interval) -> Tensor:
        """The rows of one block."""
        return self.get_parameter(_name(interval))

    @property
    def size(self) -> int:
        """V."""
        return self.intervals[-1][1]

    @property
    def weight(self) -> Float[Tensor, "V D"]:
        """A copy of the whole table. Under ZeRO-3 and FSDP there is none outside a forward pass."""
        return torch.cat([self.block(interval) for interval in self.intervals])


class SplitEmbedding(SplitTable):
    """An input embedding in blocks.

    Args:
        scale: of what is looked up.
    """

    def __init__(self, blocks: dict[Interval, nn.Parameter], scale: float = 1.0) -> None:
        super().__init__(blocks)
        self.scale = scale

    def forward(self, ids: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape D"]:
        found: Any = None
        for start, stop in self.intervals:
            inside = (ids >= start) & (ids < stop)
            part = nn.functional.embedding(torch.where(inside, ids - start, 0), self.block((start, stop)))
            found = part if found is None else torch.where(inside.unsqueeze(-1), part, found)
        return found if self.scale == 1 else found * self.scale


class SplitHead(SplitTable):
    """An output matrix in blocks: `RestrictedHead` with the same calls, values and gradients.

    The text's columns lie in one block and the codes' in another, so a product with some columns is made as before;
    columns that are in several blocks are copied together first.
    """

    softcap: float | None = None  # as `RestrictedHead` has it

    def forward(
        self,
        hidden: Float[Tensor, "*rows D"],
        targets: Int[Tensor, "N"] | None = None,
        start: int | Sequence[int] | None = None,
        stop: int | Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Float[Tensor, "*shape"]:
        """What the arguments ask for: see `RestrictedHead.forward`, which raises the same."""
        if start is None and stop is None and targets is None:
            return torch.cat([self._logits(hidden, *interval) for interval in self.intervals], dim=-1)
        if start is None or stop is None:
            raise ValueError("columns are start and stop: give both")
        if targets is not None:
            return self._cross_entropy(hidden, targets, start, stop, rows)
        if not isinstance(start, int) or not isinstance(stop, int) or rows is not None:
            raise ValueError("logits are of one group: start and stop are integers, and rows is left out")
        check_groups(len(hidden), self.size, start, stop, None)
        return self._logits(hidden, start, stop)

    def _logits(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        columns, first = self._columns(start, stop)
        logits = nn.functional.linear(hidden, columns[start - first : stop - first].to(hidden.dtype))
        return capped(logits, self.softcap)

    def _columns(self, start: int, stop: int) -> tuple[Tensor, int]:
        """A tensor that holds these columns, and which column is its first."""
        parts = [(max(a, start) - a, min(b, stop) - a, a, b) for a, b in self.intervals if max(a, start) < min(b, stop)]
        if len(parts) == 1:
            return self.block(parts[0][2:]), parts[0][2]
        return torch.cat([self.block((a, b))[first:last] for first, last, a, b in parts]), start

    def _cross_entropy(
        self,
        hidden: Float[Tensor, "N D"],
        targets: Int[Tensor, "N"],
        start: int | Sequence[int],
        stop: int | Sequence[int],
        rows: Sequence[int] | None,
    ) -> Float[Tensor, "N"]:
        groups = check_groups(len(hidden), self.size, start, stop, rows)
        found, end = [], 0
        placed = [(self._columns(a, b), (n, a, b)) for n, a, b in groups]
        for _, members in itertools.groupby(placed, key=lambda one: id(one[0][0])):  # groups of one block in one call
            (columns, first), _ = (run := list(members))[0]
            counts, starts, stops = zip(*(group for _, group in run), strict=True)
            begin, end = end, end + sum(counts)
            found.append(
                restricted_cross_entropy(
                    hidden[begin:end],
                    columns,
                    targets[begin:end] - first,
                    [a - first for a in starts],
                    [b - first for b in stops],
                    counts,
                    self.softcap,
                )
            )
        return torch.cat(found)


def split_rows(backbone: Any, trained: Sequence[Interval]) -> None:
    """Put both tables of a backbone into blocks, cut where `trained` rows begin and end; a tie stays a tie.

    Weights may be on the meta device. Without `trained` rows each table stays whole.

    Raises:
        UserError: the backbone embeds by a class of its own that does more than to look up and scale.
    """
    embedding, head = backbone.get_input_embeddings(), backbone.get_output_embeddings()
    scale = getattr(embedding, "scalar_embed_scale", 1.0)
    if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
        raise UserError(
            f"lora.rows: {type(backbone).__name__} embeds by {type(embedding).__name__}, which cannot be split; "
            "set lora.rows=none"
        )
    tied = embedding.weight is head.weight
    blocks = _blocks(embedding.weight, trained)
    backbone.set_input_embeddings(SplitEmbedding(blocks, scale))
    split = SplitHead(blocks if tied else _blocks(head.weight, trained))
    split.softcap = getattr(head, "softcap", None)
    backbone.set_output_embeddings(split)


def _blocks(weight: Tensor, trained: Sequence[Interval]) -> dict[Interval, nn.Parameter]:
    cuts = sorted({0, len(weight), *itertools.chain.from_iterable(trained)})
    return {(a, b): nn.Parameter(weight.detach()[a:b].clone()) for a, b in itertools.pairwise(cuts)}


def _name(interval: Interval) -> str:
    return f"rows_{interval[0]}_{interval[1]}"
