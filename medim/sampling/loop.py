"""The one loop that runs every plan, on any denoiser.

Shape letters: B batch, L canvas length, N rows of a group, C columns of a group, P forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import LINEAR, Denoiser, Group, Schedule, groups_of, predict
from medim.sampling.draw import Generators, Seen, Uniform, guide, observe, row_seeds
from medim.sampling.plans import Plan
from medim.sampling.walks import REVEALS, VALUES, Walk

Plans = Plan | Sequence[tuple[Plan, Bool[Tensor, "B L"]]]


@dataclass
class Cost:
    """What runs of the loop spent.

    Attributes:
        forward_passes: of the batch. `active_tokens`: positions that went through them, of both branches of guidance.
        row_passes: the passes that mattered to each row: what it would cost alone, whatever stands beside it.
    """

    forward_passes: int = 0
    active_tokens: int = 0
    row_passes: list[int] = field(default_factory=list)


@dataclass
class Means:
    """What the model expects at each position, as a vector: sum_v p(v) table[v], p that of the pass that revealed it.

    Of all vectors it has the least expected squared error, which no drawn value has: a point estimate, not a sample.

    Attributes:
        table: [C, E], the vectors of the ids from `start` on: the columns of one group.
        values: [B, L, E], filled by `sample`; 0 at positions that were not revealed.
    """

    table: Float[Tensor, "C E"]
    start: int
    values: Float[Tensor, "B L E"] | None = None


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    canvas: Int[Tensor, "B L"],
    generate: Bool[Tensor, "B L"],
    plan: Plans,
    *,
    mask_id: int,
    generator: Generators,
    condition: Bool[Tensor, "B L"] | Sequence[tuple[Bool[Tensor, "B L"], float]] | None = None,
    order: Int[Tensor, "B L"] | None = None,
    schedule: Schedule = LINEAR,
    cost: Cost | None = None,
    means: Means | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "B L"]:
    """Fill the positions of `generate`; all others keep their ids.

    Args:
        canvas: ids; what stands at generated positions is ignored. A position outside `generate` that holds [MASK] is
            unknown: the denoiser is told t=1 there, and t=0 at every other such position.
        plan: one for all positions, or several with the positions of each: they walk in the same forward passes, as
            many as the longest needs, each told its own noise level.
        generator: one for all rows, or one a row: then a row's result does not depend on the rows beside it. A row
            takes one number from it, whatever the plan.
        condition: positions that the other branch of guidance sees masked (t=1); needed if `plan.guidance`. Or several,
            each with its weight k and a branch of its own: log p = log p(x|c) + w sum_s k_s (log p(x|c) - log p(x|c
            without s)), normalised, so that each given segment is heeded as strongly as is wanted.
        order: rank of each position for ``halton``, -1 where it has none; see `halton_order`.
        schedule: the denoiser's own, that of its training: translates shares of masked positions into its noise levels.
        cost: is added to.
        means: gets the expected vector of each position of its columns, after guidance and before the temperature.
        progress: called with (passes done, passes in all at most) after each pass.

    Returns:
        ids [B, L] without [MASK] at generated positions.

    Raises:
        ValueError: guidance without `condition`, ``halton`` without `order`, plans that do not cover `generate` once.
    """
    plans = _covering(plan, generate)
    if any(p.guidance for p, _ in plans.values()) and condition is None:
        raise ValueError("guidance needs `condition`: the positions that the unconditional branch does not see")
    ids = torch.where(generate, mask_id, canvas)
    seeds = row_seeds(generator, len(canvas), canvas.device)  # also of rows without any: others may have some
    if not plans:
        return ids
    unknown = (~generate & (canvas == mask_id)).float()
    groups = groups_of(denoiser, generate)
    parts = [
        _Part(p, where, groups, Uniform(seeds, where, number), schedule, order, means)
        for number, (p, where) in plans.items()
    ]
    passes = max(part.walk.steps for part in parts)
    two_branches = [any(flags) for flags in zip(*(part.guided(passes) for part in parts), strict=True)]
    parted = [(condition, 1.0)] if isinstance(condition, Tensor) else list(condition or ())
    forward = _branches(denoiser, generate, groups, parted if any(two_branches) else [], mask_id)
    finished = None if all(part.plan.fixed for part in parts) else _Finished()
    least = max(part.walk.steps if part.plan.remask else 1 for part in parts)  # nothing masked now may be masked again
    row_passes, k = torch.zeros_like(seeds), 0
    for k in range(passes):
        masked = generate & (ids == mask_id)
        row_passes += torch.stack([part.walk.busy(k, masked & part.where) for part in parts]).any(0)
        t = unknown
        for part in parts:
            t = torch.where(part.where, part.walk.level(k, masked & part.where).unsqueeze(1), t)
        log_p = forward(ids, t, two_branches[k])
        for part in parts:
            ids = part.advance(k, ids, masked & part.where, t, log_p, mask_id)
        if progress is not None:
            progress(k + 1, passes)
        if finished is not None and least <= k + 1 < passes and finished(~(generate & (ids == mask_id)).any()):
            break
    if cost is not None:
        cost.forward_passes += k + 1
        cost.active_tokens += (k + 1 + len(parted) * sum(two_branches[: k + 1])) * ids.numel()
        before = cost.row_passes or [0] * len(row_passes)
        cost.row_passes = [a + b for a, b in zip(before, row_passes.tolist(), strict=True)]
    return ids


def _covering(plan: Plans, generate: Bool[Tensor, "B L"]) -> dict[int, tuple[Plan, Tensor]]:
    """The plans that have positions, by number, with their positions: each position of `generate` has one."""
    plans = [(plan, generate)] if isinstance(plan, Plan) else list(plan)
    total = torch.zeros_like(generate, dtype=torch.long)
    for _, where in plans:
        total = total + where
    if not torch.equal(total, generate.long()):
        raise ValueError("the plans' positions must cover `generate`: each of its positions once, and no other")
    return {number: (p, where) for number, (p, where) in enumerate(plans) if bool(where.any())}


LogP = list[tuple[Float[Tensor, "_ _"], Float[Tensor, "_ _"] | None]]


def _branches(
    denoiser: Denoiser,
    generate: Bool[Tensor, "B L"],
    groups: list[Group],
    conditions: Sequence[tuple[Tensor, float]],
    mask_id: int,
) -> Callable[[Tensor, Tensor, bool], LogP]:
    """The forward pass: (ids, t, all branches?) -> log p(x|c) of each group, and what guidance turns away from: the
    weighted log p(x|c without a condition) of the same batched pass, log p(x|c) itself for the weight that is left."""
    copies = 1 + len(conditions)
    if conditions:
        repeated = groups_of(denoiser, torch.cat([generate] * copies))

    def forward(ids: Tensor, t: Tensor, every: bool) -> LogP:
        if not conditions or not every:
            return [(part, None) for part in predict(denoiser, ids, t, groups, mask_id=mask_id)]
        many = torch.cat([ids, *(torch.where(where, mask_id, ids) for where, _ in conditions)])
        times = torch.cat([t, *(torch.where(where, 1.0, t) for where, _ in conditions)])
        parts: LogP = []
        for part in predict(denoiser, many, times, repeated, mask_id=mask_id):
            with_c, *others = part.chunk(copies)
            if len(others) == 1 and conditions[0][1] == 1:
                parts.append((with_c, others[0]))
                continue
            finite = with_c.clamp(min=-1e4)
            turned = sum(
                (k * (one.clamp(min=-1e4) - finite) for one, (_, k) in zip(others, conditions, strict=True)), finite
            )
            parts.append((with_c, turned))
        return parts

    return forward


class _Part:
    """A plan, its positions, and what it remembers from pass to pass."""

    def __init__(
        self,
        plan: Plan,
        where: Bool[Tensor, "B L"],
        groups: list[Group],
        uniform: Uniform,
        schedule: Schedule,
        order: Int[Tensor, "B L"] | None,
        means: Means | None = None,
    ) -> None:
        self.plan, self.where, self.uniform, self.means = plan, where, uniform, means
        if means is not None and means.values is None:
            means.values = means.table.new_zeros(*where.shape, means.table.shape[1])
        self.n = where.sum(1).clamp(min=1)
        self.walk: Walk = REVEALS[plan.name](plan, where, uniform, schedule, order)
        self.pieces = [(g, *piece) for g, group in enumerate(groups) if (piece := self._piece(group)) is not None]
        self.best = torch.full_like(where, -1, dtype=torch.long)  # of the last pass
        self.streak = torch.zeros_like(self.n)  # passes for which it has been the same

    def _piece(self, group: Group) -> tuple[Tensor | None, Tensor, int] | None:
        """Which rows of a group are ours (None: all), their places in the flattened canvas, the first column's id."""
        inside = self.where.flatten()[group.rows].nonzero().squeeze(1)
        if len(inside) == len(group.rows):
            return None, group.rows, group.start
        return (inside, group.rows[inside], group.start) if len(inside) else None

    def guided(self, passes: int) -> list[bool]:
        """The passes that need both branches, as far as that is known beforehand."""
        times = self.walk.times
        if self.plan.guidance == 0 or times is None:
            return [self.plan.guidance > 0] * passes
        needed = ((self.plan.scale(times) > 0) & (times > 0)).any(1).tolist()
        return needed + [False] * (passes - len(needed))

    def advance(self, k: int, ids: Tensor, masked: Tensor, t: Tensor, log_p: LogP, mask_id: int) -> Tensor:
        """The ids after pass k."""
        if k >= self.walk.steps:
            return ids
        seen = self._see(k, masked, t, log_p)
        chosen, value = self.walk.choose(k, masked, seen), seen.value
        if self.plan.patience is not None:
            stop = self._settled(masked, seen).unsqueeze(1) & masked
            chosen, value = chosen | stop, torch.where(stop, seen.best, value)
        if self.means is not None:
            self._expect(chosen, t, log_p)
        again = self.walk.remask(k, masked)
        ids = torch.where(chosen, value, ids)
        return ids if again is None else torch.where(again, mask_id, ids)

    def _see(self, k: int, masked: Tensor, t: Tensor, log_p: LogP) -> Seen:
        """What the pass says of our positions, on the canvas."""
        u = self.uniform(VALUES + 2 * k).flatten()
        share = (masked.sum(1) / self.n).unsqueeze(1).expand(masked.shape).flatten()
        flat: list[Tensor] = []
        for piece in self.pieces:
            _, _, rows, start = piece
            with_c = self._guided(piece, t, log_p)
            seen = observe(with_c, u[rows], share[rows], start, self.plan)
            columns = (seen.value, seen.score, seen.best, seen.top, seen.entropy)
            flat = flat or [torch.zeros(masked.numel(), dtype=c.dtype, device=c.device) for c in columns]
            for whole, column in zip(flat, columns, strict=True):
                whole[rows] = column
        return Seen(*(whole.view(masked.shape) for whole in flat))

    def _guided(self, piece: tuple[int, Tensor | None, Tensor, int], t: Tensor, log_p: LogP) -> Tensor:
        """log p of the rows of a piece, guided."""
        g, take, rows, _ = piece
        with_c, without = log_p[g] if take is None else (x if x is None else x[take] for x in log_p[g])
        assert with_c is not None
        if without is None or not self.plan.guidance:
            return with_c
        return guide(with_c, without, self.plan.scale(t.flatten()[rows]))

    def _expect(self, chosen: Tensor, t: Tensor, log_p: LogP) -> None:
        """Note the expected vectors of the positions that a pass reveals."""
        assert self.means is not None and self.means.values is not None
        for piece in self.pieces:
            _, _, rows, start = piece
            if start == self.means.start:
                values, table = self.means.values.flatten(0, 1), self.means.table
                mean = self._guided(piece, t, log_p).exp().to(table.dtype) @ table
                values[rows] = torch.where(chosen.flatten()[rows].unsqueeze(1), mean, values[rows])

    def _settled(self, masked: Tensor, seen: Seen) -> Tensor:
        """The rows whose most probable values have stayed the same for long enough, and are probable enough."""
        sure = seen.top.exp() > self.plan.patience_confidence
        same = (((seen.best == self.best) & sure) | ~masked).all(1)
        self.streak, self.best = torch.where(same, self.streak + 1, 0), seen.best
        assert self.plan.patience is not None
        return self.streak >= self.plan.patience


class _Finished:
    """Tells the host that all rows are done, without a pause of the device.

    On CUDA the answer is copied to pinned memory behind the pass that it is about, and looked at one pass later, when
    the device has that pass to do: so it never idles, and one pass more than needed is run, which changes no id. The
    host waits for the copy of the pass before, lest it run ahead by an unknown number of passes. Elsewhere it is read.
    """

    def __init__(self) -> None:
        self.last: tuple[Tensor, torch.cuda.Event] | None = None

    def __call__(self, done: Bool[Tensor, ""]) -> bool:
        if done.device.type != "cuda":
            return bool(done)
        flag, event = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        flag.copy_(done, non_blocking=True)
        event.record()
        last, self.last = self.last, (flag, event)
        if last is None:
            return False
        last[1].synchronize()
        return bool(last[0])
