"""Masked (absorbing-state) discrete diffusion: schedule, corruption, loss weight, likelihood bound.

Pure functions; noise and time are arguments. Sources: MDLM (Sahoo et al. 2024, arXiv 2406.07524), MD4 (Shi et al. 2024,
arXiv 2406.04329), MaskGIT (Chang et al. 2022, arXiv 2202.04200).
Shape letters: B batch, L canvas length, N selected rows, V joint vocabulary, C columns of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Weighting = Literal["mdlm", "flat", "min_snr"]
ScheduleName = Literal["linear", "cosine", "polynomial"]


@dataclass(frozen=True)
class Schedule:
    """alpha(t): the probability that a position is still clean at noise level t; alpha(0)=1, alpha(1)=0.

    ``linear``: alpha = 1 - t (MDLM's log-linear schedule); ``cosine``: alpha = 1 - sin(pi t / 2) (MaskGIT's: few
    positions are revealed first); ``polynomial``: alpha = 1 - t^power. All three are in MD4's table 1.

    Attributes:
        power: of ``polynomial`` only; 1 is linear, above 1 fewer positions are masked at each t.

    Raises:
        ValueError: an unknown name; a power that is not a positive number.

    Example:
        >>> Schedule("linear").alpha(torch.tensor([0.0, 0.25, 1.0]))
        tensor([1.0000, 0.7500, 0.0000])
    """

    name: ScheduleName = "linear"
    power: float = 2.0

    def __post_init__(self) -> None:
        if self.name not in get_args(ScheduleName):
            raise ValueError(f"unknown schedule {self.name!r}: one of {', '.join(get_args(ScheduleName))}")
        if not 0 < self.power < math.inf:
            raise ValueError(f"power={self.power}: a positive number is needed")

    @property
    def exponent(self) -> float:
        """p of alpha = 1 - t^p, for all but ``cosine``."""
        return self.power if self.name == "polynomial" else 1.0

    def mask_probability(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """1 - alpha(t), without the rounding of 1 - (1 - x)."""
        return torch.sin(t * (math.pi / 2)) if self.name == "cosine" else t**self.exponent

    def alpha(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The clean probability, same shape as `t`."""
        return 1 - self.mask_probability(t)

    def derivative(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """alpha'(t), not positive; the cosine's is 0 at t=1, the polynomial's at t=0 if its power is above 1."""
        if self.name == "cosine":
            return -(math.pi / 2) * torch.sin((1 - t) * (math.pi / 2))
        return -self.exponent * t ** (self.exponent - 1)

    def inverse(self, alpha: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The noise level at which a share `alpha` is clean."""
        return torch.asin(1 - alpha) * (2 / math.pi) if self.name == "cosine" else (1 - alpha) ** (1 / self.exponent)

    def weight(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """-alpha'(t) / (1 - alpha(t)): the weight of a masked position's cross-entropy (MDLM eq. 10).

        1/t if linear, power/t if polynomial, pi/2 cot(pi t / 2) if cosine. All have a pole at t=0 (the value there is
        inf); at t=1 they are 1, power and 0.
        """
        if self.name == "cosine":
            return -self.derivative(t) / self.mask_probability(t)
        return self.exponent / t


def loss_weight(
    schedule: Schedule, weighting: Weighting, t: Float[Tensor, "..."], clamp: float = 5.0
) -> Float[Tensor, "..."]:
    """The factor on the cross-entropy of a position that is masked at noise level t, same shape as `t`.

    ``mdlm``: `schedule.weight(t)`; only this makes the loss the likelihood bound (MDLM eq. 10).
    ``flat``: 1, MaskGIT's; not the bound. For the linear schedule it is the bound's integrand times t.
    ``min_snr``: min(`schedule.weight(t)`, `clamp`); not the bound but below it, as small t count for less. The idea,
    and the default of 5, are from Min-SNR (Hang et al. 2023, arXiv 2303.09556), which clamps a Gaussian diffusion's
    signal-to-noise ratio. What is clamped here is the weight itself; for the linear schedule that is 1 + alpha/(1 -
    alpha), one more than the ratio of clean to masked, so that every t below 1/clamp has the same weight.
    """
    if weighting == "flat":
        return torch.ones_like(t)
    weight = schedule.weight(t)
    return weight.clamp(max=clamp) if weighting == "min_snr" else weight


LINEAR = Schedule("linear")


def corrupt(
    x0: Int[Tensor, "B L"],
    t: Float[Tensor, "B L"],
    generate: Bool[Tensor, "B L"],
    *,
    mask_id: int,
    noise: Float[Tensor, "B L"],
    schedule: Schedule = LINEAR,
) -> tuple[Int[Tensor, "B L"], Bool[Tensor, "B L"]]:
    """Mask each position of `generate` with probability 1 - alpha(t): sample q(x_t | x_0) (MDLM eq. 3).

    Args:
        noise: uniform numbers in [0, 1); the mask is a pure function of them.

    Returns:
        The corrupted ids and where they are masked. At t=0 nothing is masked, at t=1 all of `generate` is.
    """
    masked = generate & (noise < 1 - schedule.alpha(t))
    return torch.where(masked, mask_id, x0), masked


@runtime_checkable
class Denoiser(Protocol):
    """Anything that predicts clean ids: logits of p(x_0 | x_t) at every position."""

    def __call__(self, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"]) -> Float[Tensor, "B L V"]: ...


@dataclass(frozen=True)
class Group:
    """Positions that share their possible values: `rows` index the flattened [B*L], columns are start..stop of V."""

    rows: Int[Tensor, "N"]
    start: int
    stop: int


def groups_of(denoiser: Denoiser, generate: Bool[Tensor, "B L"], vocabulary_size: int | None = None) -> list[Group]:
    """The groups of the positions in `generate`: a denoiser's own (`denoiser.groups`), else one over all columns."""
    own = getattr(denoiser, "groups", None)
    if own is not None:
        return own(generate)
    return [Group(generate.flatten().nonzero().squeeze(1), 0, vocabulary_size or -1)]


def predict(
    denoiser: Denoiser, ids: Int[Tensor, "B L"], t: Float[Tensor, "B L"], groups: Sequence[Group], *, mask_id: int
) -> list[Float[Tensor, "_ _"]]:
    """Log-probabilities of each group's rows over its columns; [MASK] is never predicted (MDLM's zero masking).

    A denoiser with a method ``restricted(ids, t, groups)`` computes just these; any other is asked for all logits.
    """
    own = getattr(denoiser, "restricted", None)
    if own is not None:
        return [torch.log_softmax(part.float(), dim=-1) for part in own(ids, t, groups)]
    logits = denoiser(ids, t)
    if mask_id < logits.shape[-1]:
        logits = logits.clone()
        logits[..., mask_id] = -torch.inf
    flat = logits.flatten(0, 1)
    parts = (flat[g.rows][:, g.start : flat.shape[1] if g.stop < 0 else g.stop] for g in groups)
    return [torch.log_softmax(part, dim=-1) for part in parts]


def token_nll(
    denoiser: Denoiser,
    ids: Int[Tensor, "B L"],
    t: Float[Tensor, "B L"],
    x0: Int[Tensor, "B L"],
    groups: Sequence[Group],
    *,
    mask_id: int,
) -> Float[Tensor, "B L"]:
    """-log p(x_0 | x_t) in nats at the rows of `groups`, zero elsewhere."""
    nll = torch.zeros(ids.numel(), device=ids.device)
    target = x0.flatten()
    for group, log_p in zip(groups, predict(denoiser, ids, t, groups, mask_id=mask_id), strict=True):
        picked = log_p.gather(1, (target[group.rows] - group.start).unsqueeze(1)).squeeze(1)
        nll = nll.index_copy(0, group.rows, -picked.to(nll.dtype))
    return nll.view(ids.shape)


Generators = torch.Generator | Sequence[torch.Generator]


def mask_orders(
    generate: Bool[Tensor, "B L"], n_times: int, generator: Generators
) -> tuple[Int[Tensor, "T B"], Int[Tensor, "T B L"]]:
    """How many generated positions are masked at each of T=`n_times` noise levels, and in which order.

    At level k the positions whose order is less than the count are masked; a position that is not generated has order
    L. A row draws one offset for its levels (stratum k of 1..n holds the count of level k) and one permutation of its n
    generated positions, which is turned on from level to level by the counts before it: each mask alone is a uniformly
    drawn set, and together they cover all positions as evenly as they can. Noise is drawn on the generator's device,
    n + 1 numbers a row, so that it depends on neither the padding nor, with a generator a row, the rows beside it.
    """
    sizes = generate.sum(1).tolist()
    rows = [generator] * len(sizes) if isinstance(generator, torch.Generator) else list(generator)
    if len(rows) != len(sizes):
        raise ValueError(f"{len(rows)} generators for {len(sizes)} rows")
    noise = [
        torch.rand(n + 1, generator=g, device=g.device).to(generate.device) for n, g in zip(sizes, rows, strict=True)
    ]
    n = generate.sum(1)
    strata = torch.arange(n_times, device=generate.device).unsqueeze(1)
    offset = torch.stack([row[0] for row in noise])
    counts = torch.minimum(((strata + offset) / n_times * n).long() + 1, n)
    draws = torch.full(generate.shape, torch.inf, device=generate.device)
    draws[generate] = torch.cat([row[1:] for row in noise])
    turned = draws.argsort(1).argsort(1) - (counts.cumsum(0) - counts).unsqueeze(2)
    return counts, torch.where(generate, turned % n.clamp(min=1).unsqueeze(1), generate.shape[1])


@torch.no_grad()
def nelbo_tokens(
    denoiser: Denoiser,
    x0: Int[Tensor, "B L"],
    generate: Bool[Tensor, "B L"],
    *,
    mask_id: int,
    n_times: int,
    generator: Generators,
    schedule: Schedule = LINEAR,
    at_once: int = 1,
) -> Float[Tensor, "T B L"]:
    """The bound of `nelbo` by position and by each of T=`n_times` noise levels; its mean over T is an estimate.

    All generated positions share one noise level (only that path bounds the joint). What is drawn is not t but how many
    of the n positions are masked: l uniform on 1..n, stratified, weight n / l, and the denoiser is told the level at
    which that share is masked. The integral over t of MDLM eq. 10 is this sum (LLaDA, Nie et al. 2025, arXiv
    2502.09992, eq. 6), but its estimate has a logarithmically diverging variance at t=0, this one a bounded variance.
    `mask_orders` says how the masks are drawn.

    Args:
        x0: a position outside `generate` that holds [MASK] is unknown: the denoiser is told t=1 there.
        generator: one, or one a row: then a row's noise does not depend on the rows beside it.
        at_once: noise levels in one call of the denoiser, which then gets `at_once` copies of the B rows.
    """
    n = generate.sum(1)
    counts, order = mask_orders(generate, n_times, generator)
    unknown = (~generate & (x0 == mask_id)).float()
    terms = []
    for count, rank in zip(counts.split(at_once), order.split(at_once), strict=True):
        masked = (rank < count.unsqueeze(2)).flatten(0, 1)
        share = (count / n.clamp(min=1)).flatten().unsqueeze(1)
        clean, where, given = (part.repeat(len(count), 1) for part in (x0, generate, unknown))
        level = torch.where(where, schedule.inverse(1 - share), given)
        ids = torch.where(masked, mask_id, clean)
        nll = token_nll(denoiser, ids, level, clean, groups_of(denoiser, masked), mask_id=mask_id)
        terms.append((nll / share.clamp(min=1 / generate.shape[1])).view(len(count), *x0.shape))
    return torch.cat(terms)


def nelbo(
    denoiser: Denoiser,
    x0: Int[Tensor, "B L"],
    generate: Bool[Tensor, "B L"],
    *,
    mask_id: int,
    n_times: int = 32,
    generator: Generators,
    schedule: Schedule = LINEAR,
) -> Float[Tensor, "B"]:
    """An upper bound of -log p(x_0[generate] | x_0[~generate]) in nats, unbiased.

    NELBO = E_t [ -alpha'(t)/(1-alpha(t)) * sum over masked i of -log p(x_0^i | x_t) ]  (MDLM eq. 10, t ~ U(0, 1)),
    estimated as `nelbo_tokens` says.
    With the exact posterior as the denoiser it equals the negative log likelihood, for any order of unmasking.
    """
    terms = nelbo_tokens(
        denoiser, x0, generate, mask_id=mask_id, n_times=n_times, generator=generator, schedule=schedule
    )
    return terms.mean(0).sum(1)
