"""Task mixture -> noise levels -> loss sums and counts, by modality and noise level.

A task is nothing but the noise levels of segments. Levels and masks are a pure function of (seed, step, place in the
global batch), so they do not depend on the number of processes and survive a resume.
Shape letters: B batch, L canvas length, S segments, N supervised rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import numpy as np
import pydantic
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from medim.alignment import barlow_twins, info_nce
from medim.canvas import ROLES, Canvas
from medim.config import options
from medim.diffusion import Schedule, ScheduleName, Weighting, loss_weight
from medim.model.medim import ConditionAttention, Pooled, Scored
from medim.vocabulary import KINDS

T_BINS = 10
BESIDE = ("align", "invariance")
Task = Literal["joint", "pair", "report", "image", "translate"]
# the roles that have t=0; of the images of `translate`, all but one
GIVEN: dict[Task, tuple[str, ...]] = {
    "joint": (),
    "pair": (),
    "report": ("image",),
    "image": ("report",),
    "translate": ("image", "report"),
}


@options
class ObjectiveOptions:
    """What is learnt, and how it is weighed.

    Attributes:
        tasks: mixture weights; ``joint`` draws one noise level for all segments (MeDiM's), ``pair`` an independent one
            for each, ``report`` is given all images, ``image`` the report, ``translate`` all but one of the images, and
            the report.
        condition_dropout: probability that what is given is wholly masked instead (trains guidance).
        condition_attention: whether given segments attend to generated ones (``full``, the paper's) or only to each
            other (``prefix``: sampling computes them once).
        schedule, schedule_power: alpha(t), see `medim.diffusion.Schedule`; the power is the polynomial's.
        weighting: ``mdlm`` is the bound's -alpha'/(1-alpha), ``flat`` is MaskGIT's 1, ``min_snr`` is the smaller of the
            bound's and `snr_clamp`. Only the first is the bound: see `medim.diffusion.loss_weight`.
        snr_clamp: the largest weight of ``min_snr``; the others ignore it.
        modality_weights: factor on text and on image positions, both in the loss and in the count that divides it.
        min_t: the smallest noise level drawn: the bound's weight has a pole at t=0.
        stratified: over the global batch, noise levels are spread evenly over [min_t, 1]; else they are independent.
        first_sentence: probability that the first sentence of a study's report is given (MeDiM's prompt: 0.1).
        align: weight of `info_nce` between each study's report and one of its images, each in a pass of its own; needs
            `model.embed`. Candidates are the pairs of a part of the batch (`train.accumulate`), over all processes.
        invariance: weight of `barlow_twins` between two of an image's stored views (`medim prepare --views`).
    """

    tasks: dict[Task, float] = field(default_factory=lambda: {"pair": 0.6, "report": 0.2, "image": 0.2})
    condition_dropout: float = 0.1
    condition_attention: ConditionAttention = "full"
    schedule: ScheduleName = "linear"
    schedule_power: float = pydantic.Field(default=2.0, gt=0)
    weighting: Weighting = "flat"
    snr_clamp: float = pydantic.Field(default=5.0, gt=0)
    modality_weights: dict[Literal["text", "image"], float] = field(default_factory=lambda: {"text": 1.0, "image": 1.0})
    min_t: float = 1e-3
    stratified: bool = True
    first_sentence: Annotated[float, pydantic.Field(ge=0, le=1)] = 0.0
    align: Annotated[float, pydantic.Field(ge=0)] = 0.0
    invariance: Annotated[float, pydantic.Field(ge=0)] = 0.0


@dataclass(frozen=True)
class Alone:
    """Segments by themselves, a row each, at the places of studies that have what is needed.

    Attributes:
        images, texts: the first and the second half of each pair: an image and its report, or two views of an image.
        group: number of the modality of each pair's image.
    """

    images: Canvas
    others: Canvas
    group: Int[Tensor, "M"]

    def to(self, device: torch.device | str) -> Alone:
        """The same on another device."""
        return Alone(self.images.to(device), self.others.to(device), self.group.to(device, non_blocking=True))


@dataclass(frozen=True)
class Batch:
    """One step's rows on one process: a corrupted canvas, what is to be restored, and segments by themselves."""

    canvas: Canvas  # ids are corrupted
    t: Float[Tensor, "B S"]
    rows: tuple[Int[Tensor, "_"], ...]  # by kind, N of each: supervised places of the flattened [B*L]
    targets: tuple[Int[Tensor, "_"], ...]  # by kind: their clean ids
    given: Bool[Tensor, "B L"] | None = None  # positions that attend to each other only
    align: Alone | None = None
    invariance: Alone | None = None

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on another device."""
        rows, targets = (tuple(v.to(device, non_blocking=True) for v in part) for part in (self.rows, self.targets))
        given = None if self.given is None else self.given.to(device, non_blocking=True)
        align, invariance = (None if one is None else one.to(device) for one in (self.align, self.invariance))
        t = self.t.to(device, non_blocking=True)
        return Batch(self.canvas.to(device), t, rows, targets, given, align, invariance)


@dataclass(frozen=True)
class Loss:
    """Sums over supervised positions, to be divided by global counts by whoever knows all processes.

    Attributes:
        total: weighted sum of cross-entropies in nats, with gradient.
        nats: unweighted cross-entropy sums by kind and noise-level bin, detached.
        positions: how many positions each cell of `nats` holds.
        beside: this process's share of the weighted losses that are means already (`align`, `invariance`), with
            gradient: not to be divided. `parts`: them, unweighted and detached, in the order of `BESIDE`.
    """

    total: Float[Tensor, ""]
    nats: Float[Tensor, "K T"]
    positions: Float[Tensor, "K T"]
    beside: Float[Tensor, ""]
    parts: Float[Tensor, "2"]


def noise_levels(
    roles: Int[np.ndarray, "B S"], places: Sequence[int], batch_size: int, step: int, seed: int, o: ObjectiveOptions
) -> tuple[Float[np.ndarray, "B S"], np.ndarray]:
    """Noise levels t [B, S] of some places of a global batch, and which segments are supervised (bool [B, S]).

    t is stratified over the global batch, for each segment by itself: over all places, segment s takes one value in
    each of `batch_size` equal parts of [0, 1]. Of task ``joint``, all segments take the value of the first.
    """
    rng = np.random.default_rng([seed, 1, step])
    names = list(o.tasks)
    odds = np.array([o.tasks[name] for name in names], dtype=float)
    tasks = rng.choice(len(names), size=batch_size, p=odds / odds.sum())
    dropped = rng.random(batch_size) < o.condition_dropout
    slots = roles.shape[1]
    strata = np.stack([(rng.permutation(batch_size) + rng.random(batch_size)) / batch_size for _ in range(slots)], 1)
    if not o.stratified:
        strata = np.random.default_rng([seed, 6, step]).random((batch_size, slots))
    wanted = rng.random(batch_size)  # which image a translation makes
    here = np.asarray(places)
    t = o.min_t + (1 - o.min_t) * strata[here]
    if "joint" in names:
        t = np.where((tasks[here] == names.index("joint"))[:, None], t[:, :1], t)
    given = np.zeros_like(t, dtype=bool)
    for number, name in enumerate(names):
        asked = (tasks[here] == number)[:, None]
        given |= asked & np.isin(roles, [ROLES.index(role) for role in GIVEN[name]])
        if name == "translate":
            images = roles == ROLES.index("image")
            target = (wanted[here] * images.sum(1)).astype(int)[:, None]
            given &= ~(asked & images & (images.cumsum(1) - 1 == target))
    given &= ~(given | (roles < 0)).all(1, keepdims=True)  # nothing left to learn: then it is no condition
    t = np.where(given, np.where(dropped[here][:, None], 1.0, 0.0), t)
    return t.astype(np.float32), ~given & (roles >= 0)


def make_batch(
    canvas: Canvas,
    places: Sequence[int],
    batch_size: int,
    step: int,
    seed: int,
    o: ObjectiveOptions,
    mask_id: int,
    stops: Sequence[int] = (),
) -> Batch:
    """Noise the studies of `canvas`, which stand at `places` of the global batch of a step, padded or packed.

    `stops`: the ids that end a sentence, for `ObjectiveOptions.first_sentence`.
    """
    segment, study, position = canvas.segment.numpy(), canvas.study.numpy(), canvas.position.numpy()
    here = segment >= 0
    owner = np.zeros_like(canvas.role.numpy())  # the study of each segment of a row
    row = np.broadcast_to(np.arange(len(segment))[:, None], segment.shape)
    owner[row[here], segment[here]] = study[here]
    first = np.zeros(len(places), dtype=np.int64)  # the number that the first segment of a study has in its row
    for number in range(owner.shape[1] - 1, -1, -1):
        used = canvas.role.numpy()[:, number] >= 0
        first[owner[used, number]] = number
    own = np.arange(owner.shape[1]) - first[owner]  # and so the number of a segment within its study
    used = canvas.role.numpy() >= 0
    roles = np.full((len(places), int(own[used].max(initial=0)) + 1), -1)
    roles[owner[used], own[used]] = canvas.role.numpy()[used]
    drawn, learnt = noise_levels(roles, places, batch_size, step, seed, o)
    t = np.where(used, drawn[owner, np.where(used, own, 0)], 0.0).astype(np.float32)
    supervised = used & learnt[owner, np.where(used, own, 0)]

    longest = int(position.max()) + 1
    noise = np.stack([np.random.default_rng([seed, 2, step, place]).random(longest) for place in places])
    at = np.clip(segment, 0, None)
    level = np.where(here, np.take_along_axis(t, at, 1), 0.0)
    alpha = Schedule(o.schedule, o.schedule_power).alpha(torch.from_numpy(level)).numpy()
    masked = (noise[study, position] < 1 - alpha) & here
    learning = here & np.take_along_axis(supervised, at, 1)
    if o.first_sentence:
        kept = np.array([np.random.default_rng([seed, 7, step, place]).random() < o.first_sentence for place in places])
        masked &= ~(kept[study] & learning & first_sentences(canvas, stops))
    scored = (masked & learning).ravel()
    clean, kind = canvas.ids.numpy(), canvas.kind.numpy().ravel()
    rows = tuple(np.flatnonzero(scored & (kind == number)) for number in range(len(KINDS)))
    return Batch(
        canvas=canvas.with_ids(torch.from_numpy(np.where(masked, mask_id, clean))),
        t=torch.from_numpy(t),
        rows=tuple(torch.from_numpy(r) for r in rows),
        targets=tuple(torch.from_numpy(clean.ravel()[r]) for r in rows),
        given=canvas.outside(torch.from_numpy(learning)) if o.condition_attention == "prefix" else None,
    )


def first_sentences(canvas: Canvas, stops: Sequence[int]) -> Bool[np.ndarray, "B L"]:
    """The positions of each report up to the first id among `stops`; of a report without one, none."""
    ids, segment, role = canvas.ids.numpy(), canvas.segment.numpy(), canvas.role.numpy()
    report = (segment >= 0) & (np.take_along_axis(role, np.clip(segment, 0, None), 1) == ROLES.index("report"))
    found = np.zeros_like(report)
    for row, number in zip(*np.nonzero(role == ROLES.index("report")), strict=True):
        where = np.flatnonzero(report[row] & (segment[row] == number))
        ends = np.flatnonzero(np.isin(ids[row, where], stops))
        found[row, where[: ends[0] + 1 if len(ends) else 0]] = True
    return found


def count(batch: Batch, o: ObjectiveOptions) -> float:
    """Supervised positions of a batch, each counted with its modality's weight."""
    return sum(o.modality_weights[kind] * len(rows) for kind, rows in zip(KINDS, batch.rows, strict=True))


def loss(model: nn.Module, batch: Batch, o: ObjectiveOptions) -> Loss:
    """Weighted cross-entropy at masked positions (MDLM eq. 10), weighed as `ObjectiveOptions.weighting` says.

    `model` is a `MeDiMModel` or its DDP wrapper.

    The mean over the global batch is the sum of `Loss.total` over the sum of `count`, both over all processes.
    """
    canvas = batch.canvas
    tagged = torch.cat([batch.t, torch.zeros_like(batch.t[:, :1])], dim=1)  # tags and padding are always given: t=0
    level = torch.where(canvas.segment < 0, batch.t.shape[1], canvas.segment)
    network: Any = model.module if hasattr(model, "module") else model  # DDP's wrapper runs, the inner one knows
    score = Scored(torch.cat(batch.rows), torch.cat(batch.targets), tuple(map(len, batch.rows)))
    told = network.attention(canvas, batch.given) | network.gating(canvas, tagged.gather(1, level))
    alone = [] if batch.align is None else [Pooled(batch.align.images, "image"), Pooled(batch.align.others, "text")]
    if batch.invariance is not None:
        alone += [Pooled(batch.invariance.images, "invariant"), Pooled(batch.invariance.others, "invariant")]
    every = model(canvas.ids, tagged, level, score=score, **told, **({"alone": alone} if alone else {}))
    beside, parts = torch.zeros((), device=canvas.ids.device), torch.zeros(len(BESIDE), device=canvas.ids.device)
    if alone:
        every, embedded, log_scale = every
        beside, parts = _beside(batch, embedded, log_scale, o)
    t_flat, schedule = tagged.gather(1, level).flatten(), Schedule(o.schedule, o.schedule_power)
    total = every.new_zeros(())
    nats = torch.zeros(len(KINDS), T_BINS, device=every.device)
    positions = torch.zeros_like(nats)
    for number, (kind, nll) in enumerate(zip(KINDS, every.split(score.sizes), strict=True)):
        t = t_flat[batch.rows[number]]
        total = total + o.modality_weights[kind] * (loss_weight(schedule, o.weighting, t, o.snr_clamp) * nll).sum()
        cell = (t * T_BINS).long().clamp(max=T_BINS - 1)
        nats[number].index_add_(0, cell, nll.detach().float())
        positions[number].index_add_(0, cell, torch.ones_like(t))
    return Loss(total, nats, positions, beside, parts)


def _beside(
    batch: Batch, embedded: Sequence[Tensor], log_scale: Float[Tensor, ""], o: ObjectiveOptions
) -> tuple[Float[Tensor, ""], Float[Tensor, "2"]]:
    """The losses of segments by themselves, weighted and summed, and each by itself."""
    values = torch.zeros(len(BESIDE), device=embedded[0].device)
    total = log_scale * 0
    if batch.align is not None:
        found = info_nce(embedded[0], embedded[1], log_scale, batch.align.group)
        total, values[0] = total + o.align * found, found.detach()
    if batch.invariance is not None:
        found = barlow_twins(embedded[-2], embedded[-1], batch.invariance.group)
        total, values[1] = total + o.invariance * found, found.detach()
    return total, values
