"""The network on one canvas, as the callable that samplers and bounds take; what is given is computed once.

Shape letters: B batch, L canvas length, P given positions, Q generated segments' positions, T noise levels a row,
N rows of a group, C columns of a group, D hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache

from medim.canvas import Canvas
from medim.diffusion import Group
from medim.model.attention import key_mask
from medim.model.gates import Gated, Marks
from medim.vocabulary import KINDS

if TYPE_CHECKING:
    from medim.model.medim import MeDiMModel


class Memory(DynamicCache):
    """Keys and values of some positions. A pass fills it once; later passes attend to it and leave it as it is."""

    filled = False

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Store what comes first; after that, hand back what is stored followed by what comes."""
        if not self.filled:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer: Any = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], dim=-2), torch.cat([layer.values, value_states], dim=-2)

    def keep(self, positions: Int[Tensor, "B P"] | None = None) -> Memory:
        """Close it; of all positions that were run, keep these."""
        layers: Any = self.layers
        for layer in layers if positions is not None else ():
            assert positions is not None
            index = positions[:, None, :, None].expand(-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        self.filled = True
        return self


class _Part:
    """Some positions of each row, moved together: those of a bool mask [B, L], padded to the fullest row."""

    def __init__(self, where: Bool[Tensor, "B L"]) -> None:
        counts = where.sum(1)
        self.size = int(counts.max())
        self.positions = (~where).long().argsort(dim=1, stable=True)[:, : self.size]
        self.valid = torch.arange(self.size, device=where.device) < counts.unsqueeze(1)
        self.full = bool(self.valid.all())
        self.slot = where.long().cumsum(1) - 1  # where in the part a position of the canvas is

    def of(self, values: Tensor) -> Tensor:
        """[B, L] or twice as many rows -> the same at this part's positions."""
        return values.gather(1, self.positions.repeat(len(values) // len(self.positions), 1))


class BoundDenoiser:
    """A model on one canvas in which `generate` is to be generated: ids and noise levels to logits.

    It may be called with twice as many rows: guidance runs the layout twice in one batch. All generated positions of a
    segment are taken to have one noise level (DESIGN: a level belongs to a segment), and those outside `generate` to
    be given (t=0) or unknown (t=1).

    With ``condition_attention: prefix`` positions outside the generated segments (`Canvas.outside`) attend among
    themselves only, so their keys and values never change: with `cache` they are computed in the first call and kept.
    The ids there must not change between calls; make another denoiser for others. Exact: equal to no `cache`. Nothing
    is kept where that would not be exact: logits read beside their position, or a canvas longer than a layer's window.

    With ``full`` attention their states do depend on what is generated. `refresh` = R > 1 computes them in every R-th
    call only and is an approximation; `drift` says how far off it was.
    """

    def __init__(
        self, model: MeDiMModel, canvas: Canvas, generate: Bool[Tensor, "B L"], refresh: int = 1, cache: bool = True
    ) -> None:
        if refresh < 1:
            raise ValueError(f"refresh={refresh}: at least 1, which keeps nothing")
        self.model, self.canvas, self.generate, self.marks = model, canvas, generate, model.marks(canvas)
        self.prefix = model.config.condition_attention == "prefix"
        self._masks = "position_ids" in self.marks  # positions that fall back look like packed studies without a mask
        outside = canvas.outside(generate)
        self.given = outside if self.prefix else None
        self.refresh = refresh
        self.calls = 0
        self.tokens = 0  # positions that went through the network
        self._memory: dict[int, Memory] = {}  # by how often the layout is repeated in the batch
        self._drift: list[Tensor] = []
        segments = canvas.role.shape[1]
        scored = generate & (canvas.segment >= 0)
        first = torch.zeros_like(canvas.role).scatter_reduce(
            1,
            torch.where(scored, canvas.segment, 0),
            torch.where(scored, torch.arange(generate.shape[1], device=generate.device), 0),
            "amax",
        )
        self._any_of = first  # one generated position of each segment
        self._level = torch.where(scored, canvas.segment, segments)
        whole = not model.config.read and model.config.unseen is None and not model.is_windowed(canvas.ids.shape[1])
        self._caches = cache and whole and (self.prefix or refresh > 1)
        if self._caches:
            self._kept, self._run = _Part(outside), _Part(canvas.valid & ~outside)
            self._caches = self._kept.size > 0 and self._run.size > 0

    def groups(self, generate: Bool[Tensor, "B L"]) -> list[Group]:
        """Generated positions by kind; kinds that do not occur are left out."""
        groups = []
        kinds = self.canvas.kind.repeat(len(generate) // len(self.canvas.kind), 1)
        for number, kind in enumerate(KINDS):
            rows = (generate & (kinds == number)).flatten().nonzero().squeeze(1)
            if len(rows):
                groups.append(Group(rows, *self.model.vocabulary.columns(kind)))
        return groups

    def restricted(
        self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], groups: Sequence[Group]
    ) -> list[Float[Tensor, "_ _"]]:
        """Logits of each group's rows over its columns."""
        copies = len(ids) // len(self.generate)
        refreshed = self.calls % self.refresh == 0
        self.calls += 1
        if not self._caches:
            return self._logits(self._all(ids, t), groups)
        if self.prefix:
            if copies not in self._memory:
                self._memory[copies] = self._remember(ids, t)
            return self._logits(self._rest(ids, t), groups, self._run)
        stale = copies in self._memory
        if stale and not refreshed:
            return self._logits(self._rest(ids, t), groups, self._run)
        before = self._logits(self._rest(ids, t), groups, self._run) if stale else None
        memory = Memory()
        logits = self._logits(self._all(ids, t, memory), groups)
        self._memory[copies] = memory.keep(self._kept.positions.repeat(copies, 1))
        if before is not None:
            self._drift += [
                torch.nn.functional.kl_div(old.log_softmax(1), new.log_softmax(1), log_target=True, reduction="none")
                .sum(1)
                .mean()
                for new, old in zip(logits, before, strict=True)
            ]
        return logits

    def __call__(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B L V"]:
        """All logits, never from memory; -inf outside the columns of a position's kind."""
        hidden = self._all(ids, t)
        if self.model.config.read:
            kinds = self.canvas.kind.repeat(len(ids) // len(self.generate), 1)
            shift = torch.tensor([*(self.model.read_from(kind) for kind in KINDS), 0], device=ids.device)[kinds]
            at = (torch.arange(ids.shape[1], device=ids.device) + shift).clamp(0, ids.shape[1] - 1)
            hidden = hidden.gather(1, at.unsqueeze(-1).expand_as(hidden))
        logits = self.model.head(hidden)
        allowed = torch.zeros(len(KINDS) + 1, logits.shape[-1], dtype=torch.bool, device=logits.device)
        for number, kind in enumerate(KINDS):
            start, stop = self.model.vocabulary.columns(kind)
            allowed[number, start:stop] = True
        allowed[-1] = True  # tags and padding (kind -1): never predicted, so nothing is excluded
        return logits.masked_fill(~allowed[self.canvas.kind.repeat(len(ids) // len(self.generate), 1)], -torch.inf)

    @property
    def drift(self) -> float | None:
        """Mean KL(full || approximate) in nats a generated position, measured at the refreshed calls; None if exact."""
        return float(torch.stack(self._drift).mean()) if self._drift else None

    def _logits(
        self, hidden: Float[Tensor, "B _ D"], groups: Sequence[Group], part: _Part | None = None
    ) -> list[Float[Tensor, "_ _"]]:
        flat, parts = hidden.flatten(0, 1), []
        read = {self.model.vocabulary.columns(kind): self.model.read_from(kind) for kind in KINDS}
        for group in groups:
            rows = group.rows + read.get((group.start, group.stop), 0)
            if part is not None:
                length = self.generate.shape[1]
                row = torch.div(rows, length, rounding_mode="floor")
                rows = row * part.size + part.slot[row % len(self.generate), rows % length]
            parts.append(self.model.head(flat[rows], start=group.start, stop=group.stop))
        return parts

    def _levels(self, ids: Tensor, t: Float[Tensor, "B L"]) -> tuple[Float[Tensor, "B T"], Int[Tensor, "B L"]]:
        """One level a segment, then that of what is given and of what is unknown; and which of them a position has."""
        copies = len(ids) // len(self.generate)
        own = t.gather(1, self._any_of.repeat(copies, 1))
        ends = torch.tensor([0.0, 1.0], dtype=t.dtype, device=t.device).expand(len(t), -1)
        level, segments = self._level.repeat(copies, 1), own.shape[1]
        return torch.cat([own, ends], 1), torch.where(level == segments, segments + (t > 0.5).long(), level)

    def _all(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], memory: Memory | None = None) -> Tensor:
        copies = len(ids) // len(self.generate)
        levels, level = self._levels(ids, t)
        canvas = self.canvas if copies == 1 else self.canvas.repeat(copies)
        given = None if self.given is None else self.given.repeat(copies, 1)
        self.tokens += ids.numel()
        told = self.model.attention(canvas, given) | self.model.gating(canvas, t)
        return self.model(ids, levels, level, past_key_values=memory, **told)

    def _remember(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Memory:
        """Keys and values of the given positions, which see each other only."""
        memory, kept = Memory(), self._kept
        self._pass(ids, t, kept, (kept,), memory)
        return memory.keep()

    def _rest(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B Q D"]:
        """The generated segments, which attend to what is remembered and to themselves."""
        return self._pass(ids, t, self._run, (self._kept, self._run), self._memory[len(ids) // len(self.generate)])

    def _pass(self, ids: Tensor, t: Tensor, part: _Part, keys: Sequence[_Part], memory: Memory) -> Tensor:
        """A part of the positions, which attend to `keys`, itself among them."""
        copies = len(ids) // len(self.generate)
        levels, level = self._levels(ids, t)
        mask = None
        if self._masks or not all(one.full for one in keys):
            valid = torch.cat([one.valid for one in keys], 1).repeat(copies, 1)
            mask = key_mask(valid, self.model.attention_backend, self.model.dtype, part.size)
        gating = {}
        for name, gated in self.model.gating(self.canvas.repeat(copies), t).items():
            query = Marks(*map(part.of, gated.query))
            gating[name] = Gated(query, Marks(*(torch.cat([one.of(v) for one in keys], 1) for v in gated.key)))
        self.tokens += len(ids) * part.size
        marks = {"position_ids": part.positions.repeat(copies, 1)}
        for name, values in self.marks.items():
            repeated = values.repeat(copies, *[1] * (values.dim() - 1))
            marks[name] = repeated if name == "tags" else part.of(repeated)
        return self.model(part.of(ids), levels, part.of(level), mask, past_key_values=memory, **marks, **gating)
