"""Which positions a pass reveals: each kind of plan, laid out on one canvas.

A walk looks at its own row only, so a row does not depend on the rows beside it. Ancestral, Halton and confidence plans
know their passes and noise levels before the first pass; entropy and threshold plans know a bound. None asks the device
for a number after it was laid out.

Shape letters: B batch, L canvas length, P forward passes. Per row: n positions, of which m are still masked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import Schedule
from medim.sampling.draw import Seen, Uniform, gumbel
from medim.sampling.plans import Plan, PlanName

TIMES, VALUES, CHOICE = 0, 1, 2  # calls of a row's uniform numbers: once; each pass its own from here on


def halton_order(h: int, w: int) -> Int[Tensor, "K"]:
    """The rank of each of K = h w cells, row by row, in a Halton sequence: early cells lie far apart.

    The sequence's i-th point is (radical inverse of i in base 2, in base 3); a cell's rank is that of the first point
    in it (Besnier et al. 2025, arXiv 2503.17076).

    Example:
        >>> halton_order(2, 2).tolist()
        [2, 1, 0, 3]
    """
    count = 4 * h * w
    while True:
        i = np.arange(1, count + 1)
        cell = (_radical_inverse(i, 2) * h).astype(int) * w + (_radical_inverse(i, 3) * w).astype(int)
        first = np.unique(cell, return_index=True)[1]
        if len(first) == h * w:
            return torch.from_numpy(first.argsort().argsort())
        count *= 2


def _radical_inverse(i: np.ndarray, base: int) -> np.ndarray:
    """The digits of i mirrored at the point: 6 = 110 in base 2 gives 0.011."""
    value, unit = np.zeros(len(i)), 1.0
    while i.any():
        unit /= base
        value, i = value + unit * (i % base), i // base
    return value


@dataclass(frozen=True)
class Blocks:
    """Where the positions of a plan stand in their rows' blocks.

    Attributes:
        n: positions of a row. `steps`: its passes at most. `size`: of its blocks; the last may be smaller. `count`: of
            its blocks. `index`: of each position's block.
    """

    n: Int[Tensor, "B"]
    steps: Int[Tensor, "B"]
    size: Int[Tensor, "B"]
    count: Int[Tensor, "B"]
    index: Int[Tensor, "B L"]

    @classmethod
    def of(cls, plan: Plan, where: Bool[Tensor, "B L"]) -> Blocks:
        n = where.sum(1)
        steps = n if plan.steps is None else n.clamp(max=plan.steps)
        size = n if plan.block is None else _ceil(n, steps.clamp(min=1)).clamp(min=plan.block).minimum(n)
        size = size.clamp(min=1)
        count = _ceil(n, size).clamp(min=1)
        return cls(n, steps, size, count, (where.cumsum(1) - 1).clamp(min=0) // size.unsqueeze(1))

    def start(self, index: Int[Tensor, "B _"]) -> Int[Tensor, "B _"]:
        """The first pass of a block: all have as many passes, give or take one; or one a position, if there are."""
        even = index * self.steps.unsqueeze(1) // self.count.unsqueeze(1)
        return torch.where((self.steps == self.n).unsqueeze(1), index * self.size.unsqueeze(1), even)

    def passes(self, index: Int[Tensor, "B _"]) -> Int[Tensor, "B _"]:
        """The passes of a block, at least 1."""
        return (self.start(index + 1) - self.start(index)).minimum(self.size_of(index)).clamp(min=1)

    def size_of(self, index: Int[Tensor, "B _"]) -> Int[Tensor, "B _"]:
        """Positions of a block."""
        size = self.size.unsqueeze(1)
        return (self.n.unsqueeze(1) - index * size).clamp(min=0).minimum(size)

    def after(self, index: Int[Tensor, "B _"]) -> Int[Tensor, "B _"]:
        """Positions of the row behind a block."""
        return (self.n.unsqueeze(1) - (index + 1) * self.size.unsqueeze(1)).clamp(min=0)

    def left(self, pace: Schedule) -> Int[Tensor, "B K"]:
        """How many positions of a row are masked after each of its passes.

        In a block of n positions that has K passes, floor(n (1 - alpha(1 - k/K))) after pass k, but at least one is
        revealed a pass (MaskGIT section 3.2).
        """
        k = torch.arange(max(1, int(self.steps.max())), device=self.n.device).expand(len(self.n), -1)
        steps = self.steps.clamp(min=1).unsqueeze(1)
        even = ((k + 1) * self.count.unsqueeze(1) - 1) // steps  # the last block that starts at pass k or before
        index = torch.where(steps >= self.n.unsqueeze(1), k // self.size.unsqueeze(1), even)
        size, step = self.size_of(index), k - self.start(index) + 1
        masked = (1 - pace.alpha((1 - step.double() / self.passes(index)).clamp(min=0))) * size
        return self.after(index) + torch.floor(masked + 1e-4).long().minimum((size - step).clamp(min=0))


def _ceil(a: Tensor, b: Tensor) -> Tensor:
    return (a + b - 1) // b


class Walk:
    """A plan on one canvas. `steps`: passes at most. `times`: [P, B] noise levels, if they are known beforehand."""

    steps: int
    times: Float[Tensor, "P B"] | None = None

    def busy(self, k: int, masked: Bool[Tensor, "B L"]) -> Bool[Tensor, "B"]:
        """The rows to which pass k matters."""
        return masked.any(1)

    def level(self, k: int, masked: Bool[Tensor, "B L"]) -> Float[Tensor, "B"]:
        """What the denoiser is told at pass k; 0 for rows to which it does not matter."""
        assert self.times is not None
        return torch.where(self.busy(k, masked), self.times[min(k, self.steps - 1)], 0.0)

    def choose(self, k: int, masked: Bool[Tensor, "B L"], seen: Seen) -> Bool[Tensor, "B L"]:
        """The masked positions that pass k reveals."""
        raise NotImplementedError

    def remask(self, k: int, masked: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"] | None:
        """The revealed positions that pass k masks again; None if no pass does."""
        return None


class Appointed(Walk):
    """Every position knows its pass beforehand."""

    def __init__(
        self, where: Bool[Tensor, "B L"], event: Int[Tensor, "B L"], share: Float[Tensor, "B L"], trained: Schedule
    ) -> None:
        """From the event at which a position is revealed and the share that is masked when it is.

        A pass in which nothing of a row is revealed is not run: a row's k-th pass is its own k-th event. That changes
        nothing. A denoiser that ignores time would say again what it said; one that sees it says something new, but
        only what it says at the revealing pass is ever used.
        """
        width = int(torch.where(where, event, 0).max()) + 1
        event = torch.where(where, event, width)  # a last column for what is not ours
        occurs = torch.zeros(len(event), width + 1, dtype=torch.long, device=event.device).scatter_(1, event, 1)
        occurs[:, width] = 0
        at = (occurs.cumsum(1) - 1).gather(1, event)
        self.steps = int(occurs.sum(1).max())
        at = torch.where(where, at, self.steps)
        level = torch.zeros(len(at), self.steps + 1, dtype=share.dtype, device=at.device)
        self.times = level.scatter_(1, at, trained.inverse(1 - share))[:, :-1].T.float()
        self.at = at

    def choose(self, k: int, masked: Bool[Tensor, "B L"], seen: Seen) -> Bool[Tensor, "B L"]:
        return masked & (self.at == k)


def ancestral(
    plan: Plan, where: Bool[Tensor, "B L"], uniform: Uniform, trained: Schedule, order: Int[Tensor, "B L"] | None
) -> Walk:
    """Draw every position's reveal time at once: P(revealed before noise level t) = alpha(t), independently.

    This is the reverse process of MDLM eq. 6-7: between t and s < t a masked position is revealed with probability
    (alpha_s - alpha_t) / (1 - alpha_t). With steps=None, or as many steps as positions, each is revealed alone at its
    exact time (first-hitting sampler, Zheng et al. 2024, arXiv 2409.02908): exact for an exact denoiser. Fewer steps
    reveal together what falls between two of their edges. In a block, time starts anew.
    Cost: the passes of a row are the edges' intervals in which it has a reveal; n if steps=None.
    """
    if plan.remask is not None:
        return Remasking(plan, where, uniform, trained)
    pace, blocks = Schedule(plan.schedule), Blocks.of(plan, where)
    hit = uniform(TIMES)  # alpha at which a position is revealed
    size, after, passes = (of(blocks.index) for of in (blocks.size_of, blocks.after, blocks.passes))
    rank = _rank(torch.where(where, blocks.index + hit, torch.inf)) - blocks.index * blocks.size.unsqueeze(1)
    interval = (passes * (1 - pace.inverse(hit))).long().clamp(min=0).minimum(passes - 1)
    alone = passes == size
    clean = torch.where(alone, hit, pace.alpha(1 - interval / passes.double()))
    share = (after + size * (1 - clean)) / blocks.n.clamp(min=1).unsqueeze(1)
    event = blocks.start(blocks.index) + torch.where(alone, rank, interval)
    return Appointed(where, event, share, trained)


def halton(
    plan: Plan, where: Bool[Tensor, "B L"], uniform: Uniform, trained: Schedule, order: Int[Tensor, "B L"] | None
) -> Walk:
    """Reveal positions by their rank in `order`, as many a pass as `Blocks.left` says (arXiv 2503.17076).

    With `halton_order` as ranks, the codes of a pass lie far apart, so that they depend little on each other. Positions
    without rank (-1), such as text, come last, in random order. One position a pass is exact, as any fixed order is.
    Cost: min(steps, n) passes.
    """
    if order is None:
        raise ValueError("the plan halton needs `order`: the rank of each position, see halton_order")
    blocks = Blocks.of(plan, where)
    key = torch.where(order >= 0, order.double(), order.max() + 1 + uniform(TIMES))
    # blocks first: keys are below the number of positions plus 1
    rank = _rank(torch.where(where, blocks.index * (order.max() + 2) + key, torch.inf))
    left = blocks.left(Schedule(plan.schedule))
    n = blocks.n.unsqueeze(1)
    event = torch.searchsorted(n - left, rank, right=True).clamp(max=left.shape[1] - 1)
    share = torch.cat([n, left], 1).gather(1, event) / n.clamp(min=1).double()
    return Appointed(where, event, share, trained)


class Confidence(Walk):
    """Reveal, at each pass, the positions whose drawn value x_i has the highest noised log-probability.

    score_i = log p(x_i) + choice_temperature (1 - k/K) Gumbel noise after pass k of K; how many is `Blocks.left`
    (MaskGIT, Chang et al. 2022, arXiv 2202.04200, section 3.2). That the choice looks at the value makes probable
    values more probable: not a sampler of the model's distribution, with however many passes. Cost: min(steps, n).
    """

    def __init__(
        self,
        plan: Plan,
        where: Bool[Tensor, "B L"],
        uniform: Uniform,
        trained: Schedule,
        order: Int[Tensor, "B L"] | None,
    ) -> None:
        self.plan, self.uniform, self.blocks = plan, uniform, Blocks.of(plan, where)
        self.left = self.blocks.left(Schedule(plan.schedule))
        n = self.blocks.n.unsqueeze(1)
        before = torch.cat([n, self.left[:, :-1]], 1)
        passes = (before > 0).sum(1)
        self.steps = int(passes.max())
        self.times = trained.inverse(1 - before / n.clamp(min=1).double()).T[: self.steps].float()
        k = torch.arange(1, self.steps + 1, device=n.device).unsqueeze(1)
        self.heat = (1 - k / passes.clamp(min=1)).clamp(min=0)

    def choose(self, k: int, masked: Bool[Tensor, "B L"], seen: Seen) -> Bool[Tensor, "B L"]:
        noise = gumbel(self.uniform(CHOICE + 2 * k))
        score = seen.score + self.plan.choice_temperature * self.heat[k].unsqueeze(1) * noise
        return _first(score, _current(self.plan, self.blocks, masked), masked.sum(1) - self.left[:, k])


class Accepting(Walk):
    """Reveal as many positions as a rule on the predicted distributions accepts, at least one a pass.

    With a number of steps, at least as many as are needed to be done by then: m / (passes left), and the rest of a
    block when its last pass has come. The rule does not see the drawn values, so that one position at a time is exact.
    Cost: at most min(steps, n) passes, as many as the distributions ask for; the last one is known when it is over, so
    on a CUDA device one more is run, rather than that the device waits for the host.
    """

    def __init__(
        self,
        plan: Plan,
        where: Bool[Tensor, "B L"],
        uniform: Uniform,
        trained: Schedule,
        order: Int[Tensor, "B L"] | None,
    ) -> None:
        self.plan, self.trained, self.blocks = plan, trained, Blocks.of(plan, where)
        self.n = self.blocks.n.clamp(min=1)
        self.steps = int(self.blocks.steps.max())

    def level(self, k: int, masked: Bool[Tensor, "B L"]) -> Float[Tensor, "B"]:
        return self.trained.inverse(1 - masked.sum(1) / self.n)

    def accept(self, candidates: Bool[Tensor, "B L"], seen: Seen) -> tuple[Float[Tensor, "B L"], Int[Tensor, "B"]]:
        """The order among the candidates, highest first, and how many of them."""
        raise NotImplementedError

    def choose(self, k: int, masked: Bool[Tensor, "B L"], seen: Seen) -> Bool[Tensor, "B L"]:
        candidates = _current(self.plan, self.blocks, masked)
        here, all_left = candidates.sum(1), masked.sum(1)
        passes = (self.blocks.steps - k).clamp(min=1)
        blocks_after = _ceil(all_left - here, self.blocks.size)
        needed = _ceil(all_left, passes).maximum(_ceil(here, (passes - blocks_after).clamp(min=1)))
        score, count = self.accept(candidates, seen)
        return _first(score, candidates, count.maximum(needed))


class Entropy(Accepting):
    """Entropy-bounded: the most certain positions whose dependence is bounded (EB-Sampler, arXiv 2505.24857).

    In order of growing entropy H, the largest set U with sum_U H - max_U H <= gamma: that bounds the KL divergence
    between drawing U together and drawing it one by one. gamma=0 reveals one position a pass (and those that are
    certain) and is exact.
    """

    def accept(self, candidates: Bool[Tensor, "B L"], seen: Seen) -> tuple[Float[Tensor, "B L"], Int[Tensor, "B"]]:
        ranked = torch.where(candidates, seen.entropy, torch.inf).sort(dim=1).values
        before = ranked.cumsum(1) - ranked  # of a sorted set the last is the largest
        return -seen.entropy, ((before <= self.plan.gamma) & ranked.isfinite()).sum(1)


class Threshold(Accepting):
    """All positions whose most probable value is more probable than tau (Fast-dLLM, arXiv 2505.22618)."""

    def accept(self, candidates: Bool[Tensor, "B L"], seen: Seen) -> tuple[Float[Tensor, "B L"], Int[Tensor, "B"]]:
        return seen.top, (candidates & (seen.top.exp() > self.plan.tau)).sum(1)


class Remasking(Walk):
    """Ancestral sampling that may mask a revealed position again (ReMDM, Wang et al. 2025, arXiv 2503.00307).

    From t to s < t, with a probability sigma:
        revealed -> masked with probability sigma,
        masked -> revealed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t).
    The share of revealed positions becomes alpha_t (1 - sigma) + alpha_s - (1 - sigma) alpha_t = alpha_s for any sigma
    that keeps the second a probability: sigma <= sigma_max = min(1, (1 - alpha_s) / alpha_t). ``cap`` is
    sigma = min(eta, sigma_max), ``rescale`` is eta sigma_max. sigma is 0 outside of the window
    remask_from >= 1 - k/K >= remask_to (ReMDM-switch); with remask_hold alpha stays there at that value (ReMDM-loop),
    before and after it runs through the plan's schedule to it and to 1.
    Not exact with few passes or a large eta, since positions revealed in one pass do not know of each other. With eta
    of the order of 1/steps and many steps it is, in the limit. Cost: `steps` passes, also for short rows.
    """

    def __init__(self, plan: Plan, where: Bool[Tensor, "B L"], uniform: Uniform, trained: Schedule) -> None:
        assert plan.steps is not None
        self.where, self.uniform, self.steps = where, uniform, plan.steps
        self.some = where.any(1)
        edges = torch.linspace(1, 0, plan.steps + 1, dtype=torch.float64)
        alpha = _clean(plan, edges)
        now, then = alpha[:-1], alpha[1:]
        largest = ((1 - then) / now.clamp(min=1e-12)).clamp(max=1)
        sigma = largest.clamp(max=plan.remask_eta) if plan.remask == "cap" else plan.remask_eta * largest
        inside = (edges[:-1] <= plan.remask_from + 1e-9) & (edges[1:] >= plan.remask_to - 1e-9)
        sigma = torch.where(inside, sigma, 0.0)
        self.sigma = sigma.tolist()
        self.reveal = ((then - (1 - sigma) * now) / (1 - now).clamp(min=1e-12)).tolist()
        self.times = trained.inverse(1 - (1 - now)).float().unsqueeze(1).expand(-1, len(where)).to(where.device)

    def busy(self, k: int, masked: Bool[Tensor, "B L"]) -> Bool[Tensor, "B"]:
        return self.some & (k < self.steps)

    def choose(self, k: int, masked: Bool[Tensor, "B L"], seen: Seen) -> Bool[Tensor, "B L"]:
        if k >= self.steps - 1:
            return masked
        return masked & (self.uniform(CHOICE + 2 * k) < self.reveal[k])

    def remask(self, k: int, masked: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"] | None:
        if k >= self.steps - 1:
            return None
        return self.where & ~masked & (self.uniform(CHOICE + 2 * k) < self.sigma[k])


def _clean(plan: Plan, edges: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """alpha at each edge 1 - k/K of a remasking plan: with remask_hold, three pieces."""
    pace = Schedule(plan.schedule)
    if plan.remask_hold is None:
        return pace.alpha(edges).clamp(0, 1)
    start, end, held = plan.remask_from, plan.remask_to, plan.remask_hold
    towards = held * pace.alpha(((edges - start) / max(1 - start, 1e-9)).clamp(0, 1))
    away = held + (1 - held) * pace.alpha((edges / max(end, 1e-9)).clamp(0, 1))
    alpha = torch.where(edges > start, towards, torch.where(edges < end, away, held))
    alpha[0], alpha[-1] = 0, 1
    return alpha.clamp(0, 1)


def _rank(key: Tensor) -> Tensor:
    """The place of each key in its row's ascending order."""
    return key.argsort(dim=1, stable=True).argsort(dim=1)


def _current(plan: Plan, blocks: Blocks, masked: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
    """The masked positions of each row's first block that has any."""
    if plan.block is None:
        return masked
    first = torch.where(masked, blocks.index, masked.shape[1]).amin(1, keepdim=True)
    return masked & (blocks.index == first)


def _first(
    score: Float[Tensor, "B L"], candidates: Bool[Tensor, "B L"], count: Int[Tensor, "B"]
) -> Bool[Tensor, "B L"]:
    """The `count` candidates of each row with the highest score; of equal ones the leftmost."""
    return candidates & (_rank(-torch.where(candidates, score, -torch.inf)) < count.unsqueeze(1))


Lay = Callable[[Plan, Bool[Tensor, "B L"], Uniform, Schedule, Int[Tensor, "B L"] | None], Walk]
REVEALS: dict[PlanName, Lay] = {
    "ancestral": ancestral,
    "confidence": Confidence,
    "halton": halton,
    "entropy": Entropy,
    "threshold": Threshold,
}
