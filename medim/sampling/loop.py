"""The one loop that runs every plan, on any denoiser.

Shape letters: B batch, L canvas length, N rows of a group, C columns of a group, P forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import LINEAR, Denoiser, Group, Schedule, groups_of, predict
from medim.sampling.plans import REVEALS, Plan, Uniform, Walk

Generators = torch.Generator | Sequence[torch.Generator]


@dataclass
class Cost:
    """What a run of the loop spent: forward passes, and positions that went through them (both branches)."""

    forward_passes: int = 0
    active_tokens: int = 0


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    canvas: Int[Tensor, "B L"],
    generate: Bool[Tensor, "B L"],
    plan: Plan,
    *,
    mask_id: int,
    generator: Generators,
    condition: Bool[Tensor, "B L"] | None = None,
    schedule: Schedule = LINEAR,
    cost: Cost | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Int[Tensor, "B L"]:
    """Fill the positions of `generate`; all others keep their ids.

    Args:
        canvas: ids; what stands at generated positions is ignored. A position outside `generate` that holds [MASK] is
            unknown: the denoiser is told t=1 there, and t=0 at every other such position.
        generator: one for all rows, or one a row: then a row's result does not depend on the rows beside it.
        condition: positions that the unconditional branch of guidance sees masked (t=1); needed if `plan.guidance`.
        schedule: the denoiser's own, that of its training: translates shares of masked positions into its noise levels.
        cost: is added to.
        progress: called with (passes done, passes in all) after each pass.

    Returns:
        ids [B, L] without [MASK] at generated positions.
    """
    if plan.guidance and condition is None:
        raise ValueError("guidance needs `condition`: the positions that the unconditional branch does not see")
    ids = torch.where(generate, mask_id, canvas)
    if not bool(generate.any()):
        return ids
    uniform = _streams(generator, generate)
    walk = REVEALS[plan.name](plan, generate, uniform, schedule)
    unknown = (~generate & (canvas == mask_id)).float()
    step = _guided if plan.guidance else _plain
    groups = groups_of(denoiser, torch.cat([generate, generate]) if plan.guidance else generate)
    passes = len(walk.times)
    once = uniform() if walk.reveal_at is not None else None  # ancestral keeps the first value it draws at a position
    for k in range(passes):
        t = torch.where(generate, walk.times[k].unsqueeze(1), unknown)
        log_p = step(denoiser, ids, t, groups, condition, plan.guidance, mask_id)
        drawn, score = _draw(log_p, groups, ids, plan.temperature, uniform() if once is None else once)
        chosen = _choose(walk, k, plan, ids == mask_id, generate, score, uniform)
        ids = torch.where(chosen, drawn, ids)
        if progress is not None:
            progress(k + 1, passes)
    if cost is not None:
        cost.forward_passes += passes
        cost.active_tokens += passes * ids.numel() * (2 if plan.guidance else 1)
    return ids


def _streams(generator: Generators, generate: Bool[Tensor, "B L"]) -> Uniform:
    """Uniform numbers in [0, 1) at the generated positions, [B, L].

    A row draws as many as it has, so that its stream does not depend on the padding. The streams are split off: however
    many passes the rows beside it need, a row takes one number from its generator.
    """
    places = generate.flatten().nonzero().squeeze(1)
    one = isinstance(generator, torch.Generator)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    sizes = [len(places)] if one else generate.sum(1).tolist()
    if len(generators) != len(sizes):
        raise ValueError(f"{len(generators)} generators for {len(sizes)} rows")
    generators = [_split(g) for g in generators]

    def uniform() -> Tensor:
        numbers = [torch.rand(n, generator=g, device=g.device) for n, g in zip(sizes, generators, strict=True)]
        empty = torch.zeros(generate.numel(), device=generate.device)
        return empty.index_copy(0, places, torch.cat(numbers).to(generate.device)).view(generate.shape)

    return uniform


def _split(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**62, (), generator=generator, device=generator.device)
    return torch.Generator(generator.device).manual_seed(int(seed))


def _plain(
    denoiser: Denoiser,
    ids: Tensor,
    t: Tensor,
    groups: list[Group],
    condition: Tensor | None,
    scale: float,
    mask_id: int,
) -> list[Float[Tensor, "_ _"]]:
    return predict(denoiser, ids, t, groups, mask_id=mask_id)


def _guided(
    denoiser: Denoiser,
    ids: Tensor,
    t: Tensor,
    groups: list[Group],
    condition: Tensor | None,
    scale: float,
    mask_id: int,
) -> list[Float[Tensor, "_ _"]]:
    """Both branches in one batch: (1 + w) log p(x|c) - w log p(x), normalised (Ho & Salimans 2022, eq. 6)."""
    assert condition is not None
    both = torch.cat([ids, torch.where(condition, mask_id, ids)])
    times = torch.cat([t, torch.where(condition, 1.0, t)])
    mixed = []
    for part in predict(denoiser, both, times, groups, mask_id=mask_id):
        with_c, without = part.chunk(2)
        mixed.append(torch.log_softmax((1 + scale) * with_c - scale * without.clamp(min=-1e4), dim=-1))
    return mixed


def _draw(
    log_p: list[Float[Tensor, "_ _"]], groups: list[Group], ids: Tensor, temperature: float, u: Float[Tensor, "B L"]
) -> tuple[Int[Tensor, "B L"], Float[Tensor, "B L"]]:
    """A value for every generated position by inverse transform, and its log-probability at temperature 1.

    One uniform number a position. Sums are float32: values with less than about 1e-7 of the mass are never drawn.
    """
    drawn, score = torch.zeros_like(ids).flatten(), torch.full_like(u, -torch.inf).flatten()
    u = u.flatten()
    for part, group in zip(log_p, groups, strict=True):
        rows = group.rows[: len(part)]
        if temperature == 0:
            value = part.argmax(-1, keepdim=True)
        else:
            mass = torch.softmax(part / temperature, dim=-1).cumsum(-1)
            goal = (u[rows] * mass[:, -1]).unsqueeze(1)
            value = torch.searchsorted(mass, goal, right=True).clamp(max=part.shape[1] - 1)
        drawn[rows] = value.squeeze(1) + group.start
        score[rows] = part.gather(1, value).squeeze(1).to(score.dtype)
    return drawn.view(ids.shape), score.view(ids.shape)


def _choose(
    walk: Walk, k: int, plan: Plan, masked: Tensor, generate: Tensor, score: Float[Tensor, "B L"], uniform: Uniform
) -> Bool[Tensor, "B L"]:
    """Which of the masked positions to reveal at pass k."""
    if walk.reveal_at is not None:
        return walk.reveal_at == k
    assert walk.counts is not None and walk.heat is not None
    noise = -torch.log(-torch.log(uniform().clamp(1e-7, 1 - 1e-7)))
    score = score + plan.choice_temperature * walk.heat[k].unsqueeze(1) * noise
    score = torch.where(masked & generate, score, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    left = (masked & generate).sum(1) - walk.counts[k]
    return (rank < left.unsqueeze(1)) & masked & generate
