"""Plans: how a sampler walks from all masked to none. Data only; `medim.sampling.loop` runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import Schedule, ScheduleName

PlanName = Literal["ancestral", "confidence"]


@dataclass(frozen=True)
class Plan:
    """One way from t=1 to t=0.

    Attributes:
        name: ``ancestral`` reveals positions at random times (exact in the limit; MDLM section 3.2), ``confidence``
            reveals the positions whose drawn value is most probable (MaskGIT section 3.2).
        steps: forward passes at most. Ancestral with ``steps=None``, or with at least as many steps as a row has
            positions, reveals one position a pass at its exact time and is then exact for an exact denoiser
            (first-hitting sampler, Zheng et al. 2024, arXiv 2409.02908).
        schedule: pace: the share 1 - alpha(1 - k/K) is still masked after pass k of K. What the denoiser is told is the
            noise level at which its own training schedule masks that share.
        temperature: divides the logits before a value is drawn; 0 takes the most probable.
        choice_temperature: confidence only: scale of the Gumbel noise on the log-confidence, falling to 0 at the last
            step.
        guidance: scale w of classifier-free guidance: log p = (1 + w) log p(x|c) - w log p(x); 0 runs one branch.
    """

    name: PlanName = "ancestral"
    steps: int | None = 16
    schedule: ScheduleName = "linear"
    temperature: float = 1.0
    choice_temperature: float = 1.0
    guidance: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in REVEALS:
            raise ValueError(f"unknown plan {self.name!r}: one of {', '.join(REVEALS)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps={self.steps}: a plan needs at least one step")
        if self.temperature < 0 or self.choice_temperature < 0:
            raise ValueError("temperatures are not negative")


@dataclass(frozen=True)
class Walk:
    """A plan on one canvas, laid out before the first forward pass so that the loop never asks the device.

    Attributes:
        times: noise level that the denoiser is told at each pass, for each row.
        reveal_at: ancestral: the pass at which a position is revealed.
        counts: confidence: how many positions of a row are still masked after each pass.
        heat: confidence: share of a row's passes that are still to come after each pass.
    """

    times: Float[Tensor, "P B"]
    reveal_at: Int[Tensor, "B L"] | None = None
    counts: Int[Tensor, "P B"] | None = None
    heat: Float[Tensor, "P B"] | None = None


Uniform = Callable[[], Float[Tensor, "B L"]]  # a uniform number for each generated position, from its row's own stream


def ancestral(plan: Plan, generate: Bool[Tensor, "B L"], uniform: Uniform, trained: Schedule) -> Walk:
    """Draw every position's reveal time at once: P(revealed before noise level t) = alpha(t), independently.

    This is the reverse process of MDLM eq. 6-7: between t and s < t a masked position is revealed with probability
    (alpha_s - alpha_t) / (1 - alpha_t). Passes in which no position of any row is revealed are left out: they change
    nothing unless the denoiser sees a new time, and then only what a later pass would say. Cost: at most `steps`
    passes.
    """
    schedule = Schedule(plan.schedule)
    hits = torch.where(generate, uniform(), torch.inf)  # alpha at which a position is revealed, so its time is alpha^-1
    sizes = generate.sum(1)
    longest = int(sizes.max())
    steps = min(plan.steps or longest, longest)
    exact = sizes <= steps  # row by row: a row must not depend on the rows beside it
    order = hits.argsort(dim=1).argsort(dim=1)  # rank of each position in its row
    alphas = hits.sort(dim=1).values[:, :steps].clamp(max=1.0)  # a row with fewer positions idles at t=0
    edges = torch.linspace(1, 0, steps + 1, device=hits.device)
    bins = torch.bucketize(hits.clamp(max=1 - 1e-7), schedule.alpha(edges)[1:].contiguous())
    at = torch.where(exact.unsqueeze(1), order, bins)
    grid = trained.inverse(schedule.alpha(edges[:-1]))
    times = torch.where(exact, trained.inverse(alphas).T, grid.unsqueeze(1))
    occurs = torch.zeros(steps, dtype=torch.bool, device=hits.device)
    occurs[at[generate]] = True
    place = torch.cumsum(occurs, 0) - 1
    return Walk(times[occurs], reveal_at=torch.where(generate, place[at.clamp(max=steps - 1)], -1))


def confidence(plan: Plan, generate: Bool[Tensor, "B L"], uniform: Uniform, trained: Schedule) -> Walk:
    """Reveal, at each pass, the positions whose drawn value has the highest (noised) probability.

    The number still masked after pass k of K is n (1 - alpha(1 - (k+1)/K)) (MaskGIT section 3.2), and the denoiser is
    told the noise level at which that share is masked. Not a sampler of the model's distribution. Cost: at most `steps`
    passes.
    """
    schedule = Schedule(plan.schedule)
    n = generate.sum(1)
    steps = n if plan.steps is None else n.clamp(max=plan.steps)  # row by row, as above
    passes = torch.arange(int(steps.max()) + 1, device=n.device).unsqueeze(1)
    edges = (1 - passes / steps.clamp(min=1)).clamp(min=0)
    left = (1 - schedule.alpha(edges)) * n
    counts = torch.floor(left + 1e-4).long()  # 8.9999 is 9
    counts[1:] = torch.minimum(counts[1:], (n - passes[1:]).clamp(min=0))
    share = counts[:-1] / n.clamp(min=1)
    return Walk(trained.inverse(1 - share), counts=counts[1:], heat=edges[1:])


REVEALS: dict[PlanName, Callable[[Plan, Bool[Tensor, "B L"], Uniform, Schedule], Walk]] = {
    "ancestral": ancestral,
    "confidence": confidence,
}
