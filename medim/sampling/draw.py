"""Random numbers and values for one pass: row by row, on the device, with tails that are not cut off.

Shape letters: B batch, L canvas length, N rows of a group, C columns of a group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.diffusion import Generators
from medim.sampling.plans import Plan

CHUNK = 2**24  # entries whose float64 sums are in memory at a time: 128 MiB


def row_seeds(generator: Generators, rows: int, device: torch.device) -> Int[Tensor, "B"]:
    """One number for each row: the only one that a call takes from a row's own generator.

    Raises:
        ValueError: as many generators as rows are needed, or one.
    """
    if isinstance(generator, torch.Generator):
        return torch.randint(2**62, (rows,), generator=generator, device=generator.device).to(device)
    if len(generator) != rows:
        raise ValueError(f"{len(generator)} generators for {rows} rows")
    return torch.stack([torch.randint(2**62, (), generator=g, device=g.device) for g in generator]).to(device)


@dataclass(frozen=True)
class Uniform:
    """Uniform numbers for the positions of a plan: a function of (row's seed, call, place among the row's positions).

    So a row has the same numbers whatever stands beside it, however long the padding, and on any device; and all rows
    are made by the same few operations. The function is SplitMix64 (Steele et al. 2014, doi 10.1145/2660193.2660195),
    which reaches its n-th number without those before.

    Attributes:
        seeds: one a row. `where`: the positions. `part`: number of the plan, if several share a canvas.
    """

    seeds: Int[Tensor, "B"]
    where: Bool[Tensor, "B L"]
    part: int = 0

    def __call__(self, call: int) -> Float[Tensor, "B L"]:
        """Numbers (i + 1/2) 2^-52, i < 2^52: float64, never 0 or 1. Outside of `where` they mean nothing."""
        key = _mix(_mix(self.seeds + _steps(self.part + 1)) + _steps(call + 1))
        bits = _mix(key.unsqueeze(1) + self.where.cumsum(1) * _steps(1))
        return (_shift(bits, 12).double() + 0.5) * 2.0**-52


def _signed(bits: int) -> int:
    """The number that torch's int64 keeps in the lower 64 bits."""
    return (bits + 2**63) % 2**64 - 2**63


def _steps(n: int) -> int:
    return _signed(n * 0x9E3779B97F4A7C15)


_FIRST, _SECOND = _signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB)


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical shift of 64 bits to the right; torch's own copies the sign."""
    return (z >> by) & (2 ** (64 - by) - 1)


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * _FIRST
    z = (z ^ _shift(z, 27)) * _SECOND
    return z ^ _shift(z, 31)


def gumbel(u: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """-log(-log u). In float64 it reaches 36.7; in float32 it would end at 16.6, which acts as a lower temperature."""
    return -torch.log(-torch.log(u))


def invert(p: Float[Tensor, "N C"], u: Float[Tensor, "N"]) -> Int[Tensor, "N"]:
    """The value at which the sum of probabilities passes u: one number a row, by inverse transform.

    Args:
        p: not negative, not all zero; need not sum to 1.
        u: float64, between 0 and 1, as `Uniform` makes them.

    The sum is float64, so a value is drawn with its probability to within (C + 2) 2^-53: 1e-12 with 8192 columns.
    Rarer values may not be drawn at their rate; a value of probability zero never is. With float32 numbers the bound
    would be 6e-8, and a float32 Gumbel-max draws as if at a lower temperature (Zheng et al. 2024, arXiv 2409.02908).
    """
    mass = p.cumsum(-1, dtype=torch.float64)
    value = torch.searchsorted(mass, u.unsqueeze(1) * mass[:, -1:], right=True).squeeze(1)
    return value.clamp(max=p.shape[1] - 1)  # only a row of NaN passes its own sum


def keep_probable(p: Float[Tensor, "N C"], top_k: int | None, top_p: float) -> Float[Tensor, "N C"]:
    """Zero all but the `top_k` largest, then all but the smallest set of largest that holds `top_p` of the rest."""
    if top_k is not None and top_k < p.shape[1]:
        p = torch.where(p >= p.topk(top_k).values[:, -1:], p, 0.0)
    if top_p < 1:
        ranked = p.sort(dim=-1, descending=True).values
        mass = ranked.cumsum(-1, dtype=torch.float64)
        kept = mass - ranked < top_p * mass[:, -1:]
        p = torch.where(p >= ranked.masked_fill(~kept, torch.inf).amin(-1, keepdim=True), p, 0.0)
    return p


def guide(
    with_c: Float[Tensor, "N C"], without: Float[Tensor, "N C"], scale: Float[Tensor, "N"]
) -> Float[Tensor, "N C"]:
    """(1 + w) log p(x|c) - w log p(x), normalised; where w is 0, log p(x|c) to the bit."""
    w = scale.unsqueeze(1)
    return torch.where(w > 0, torch.log_softmax((1 + w) * with_c - w * without.clamp(min=-1e4), dim=-1), with_c)


@dataclass(frozen=True)
class Seen:
    """What a pass says of positions, [N] or [B, L].

    Attributes:
        value: the id that is drawn. `score`: its log-probability at temperature 1, before any filter.
        best: the most probable id. `top`: its log-probability. `entropy`: in nats. Empty if the plan needs none.
    """

    value: Tensor
    score: Tensor
    best: Tensor
    top: Tensor
    entropy: Tensor


def observe(
    log_p: Float[Tensor, "N C"], u: Float[Tensor, "N"], share: Float[Tensor, "N"], start: int, plan: Plan
) -> Seen:
    """Draw a value for each row; `share` of its canvas row is still masked; the first column is the id `start`."""
    chunk = max(1, CHUNK // log_p.shape[1])
    parts = [
        _observe(*each, start, plan)
        for each in zip(log_p.split(chunk), u.split(chunk), share.split(chunk), strict=True)
    ]
    if len(parts) == 1:
        return parts[0]
    return Seen(*(torch.cat([getattr(part, name) for part in parts]) for name in Seen.__dataclass_fields__))


def _observe(log_p: Tensor, u: Tensor, share: Tensor, start: int, plan: Plan) -> Seen:
    empty = log_p.new_zeros(len(log_p))
    best, top = torch.zeros_like(empty, dtype=torch.long), empty
    if plan.temperature == 0 or plan.name == "threshold" or plan.patience is not None:
        top, best = log_p.max(-1)
    if plan.temperature == 0:
        value = best
    else:
        end = plan.temperature if plan.temperature_end is None else plan.temperature_end
        temperature = end + (plan.temperature - end) * share
        p = torch.softmax(log_p / temperature.unsqueeze(1), dim=-1)
        value = invert(keep_probable(p, plan.top_k, plan.top_p), u)
    score = log_p.gather(1, value.unsqueeze(1)).squeeze(1)
    entropy = torch.special.entr(log_p.exp()).sum(-1) if plan.name == "entropy" else empty
    return Seen(value + start, score, best + start, top, entropy)
