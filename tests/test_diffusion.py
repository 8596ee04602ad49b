"""Schedules, corruption and the likelihood bound, the last against distributions small enough to enumerate."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from medim.diffusion import Group, Schedule, corrupt, loss_weight, mask_orders, nelbo, nelbo_tokens, predict, token_nll

SCHEDULES = [
    Schedule("linear"),
    Schedule("cosine"),
    Schedule("polynomial"),
    Schedule("polynomial", 3.5),
    Schedule("polynomial", 0.5),
]
all_schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.name} {s.power}")
one_of_each = pytest.mark.parametrize("schedule", SCHEDULES[:3], ids=lambda s: s.name)
both_masks = pytest.mark.parametrize("mask_id", [4, 1], ids=["mask without column", "mask in a column"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@all_schedules
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedule_ends(schedule: Schedule, dtype: torch.dtype) -> None:
    ends = torch.tensor([0.0, 1.0], dtype=dtype)
    assert schedule.alpha(ends).tolist() == [1, 0]
    assert schedule.mask_probability(ends).tolist() == [0, 1]
    back = schedule.inverse(torch.tensor([1.0, 0.0], dtype=dtype))
    assert back[0] == 0 and float(back[1]) == pytest.approx(1, abs=2e-7)
    slope, weight = schedule.derivative(ends).tolist(), schedule.weight(ends).tolist()
    assert weight[0] == math.inf  # the pole, not 0/0
    if schedule.name == "cosine":
        assert slope == pytest.approx([-math.pi / 2, 0]) and slope[1] == 0 and weight[1] == 0
    elif schedule.name == "linear":
        assert slope == [-1, -1] and weight[1] == 1
    else:
        assert slope == [0 if schedule.power > 1 else -math.inf, -schedule.power] and weight[1] == schedule.power


@all_schedules
def test_schedule_falls_and_has_an_inverse(schedule: Schedule) -> None:
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha = schedule.alpha(t)
    assert bool((alpha.diff() < 0).all())
    torch.testing.assert_close(alpha + schedule.mask_probability(t), torch.ones_like(t))
    # where alpha is flat its inverse is steep, and a rounding of 1e-16 is magnified
    torch.testing.assert_close(schedule.inverse(alpha), t, atol=3e-8, rtol=0)
    torch.testing.assert_close(schedule.alpha(schedule.inverse(t)), t, atol=1e-14, rtol=0)
    assert schedule.alpha(torch.rand(2, 3)).shape == (2, 3)


@all_schedules
def test_schedule_derivative_and_weight(schedule: Schedule) -> None:
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    slope = (schedule.alpha(t + 1e-6) - schedule.alpha(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.derivative(t), slope, atol=1e-7, rtol=1e-6)
    # the weight is the slope of log(1 - alpha), the log of the mask probability
    logs = ((1 - schedule.alpha(t + 1e-6)).log() - (1 - schedule.alpha(t - 1e-6)).log()) / 2e-6
    torch.testing.assert_close(schedule.weight(t), logs, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(schedule.weight(t), -schedule.derivative(t) / (1 - schedule.alpha(t)))


@pytest.mark.parametrize(("schedule", "at_pole"), [(s, 1.0 if s.name != "polynomial" else s.power) for s in SCHEDULES])
def test_weight_near_the_pole_is_accurate_in_single_precision(schedule: Schedule, at_pole: float) -> None:
    t = torch.tensor([1e-3, 1e-5, 1e-7])
    torch.testing.assert_close(schedule.weight(t) * t, torch.full_like(t, at_pole), rtol=2e-6, atol=0)


def test_weights_are_the_closed_forms() -> None:
    t = torch.tensor([0.1, 0.25, 0.5, 0.9])
    torch.testing.assert_close(Schedule("linear").weight(t), 1 / t)
    torch.testing.assert_close(Schedule("polynomial", 3.0).weight(t), 3 / t)
    torch.testing.assert_close(Schedule("cosine").weight(t), math.pi / 2 / torch.tan(math.pi / 2 * t))


def test_cosine_and_polynomial_mask_more_and_less_than_linear() -> None:
    half = torch.tensor(0.5)
    assert Schedule("cosine").alpha(half) == pytest.approx(1 - math.sqrt(0.5))
    assert Schedule("polynomial").alpha(half) == 0.75
    assert torch.equal(Schedule("polynomial", 1.0).alpha(half), Schedule("linear").alpha(half))


@pytest.mark.parametrize("power", [0.0, -1.0, math.inf, math.nan])
def test_a_power_that_gives_no_schedule_is_refused(power: float) -> None:
    with pytest.raises(ValueError, match="a positive number"):
        Schedule("polynomial", power)


@all_schedules
def test_loss_weights(schedule: Schedule) -> None:
    t = torch.tensor([0.0, 1e-4, 0.15, 0.2, 0.5, 1.0])
    weight = schedule.weight(t)
    torch.testing.assert_close(loss_weight(schedule, "mdlm", t), weight, rtol=0, atol=0)
    assert loss_weight(schedule, "flat", t).tolist() == [1.0] * 6
    for clamp in (1.5, 5.0, 1e3):
        clamped = loss_weight(schedule, "min_snr", t, clamp)
        assert clamped.tolist() == [min(one, clamp) for one in weight.tolist()]
        assert clamped[0] == pytest.approx(clamp)


def test_min_snr_of_the_linear_schedule_clamps_below_one_over_the_clamp() -> None:
    t = torch.tensor([0.05, 0.2, 0.25, 0.5, 1.0])
    torch.testing.assert_close(loss_weight(Schedule("linear"), "min_snr", t), torch.tensor([5.0, 5.0, 4.0, 2.0, 1.0]))
    signal_to_noise = Schedule("linear").alpha(t) / (1 - Schedule("linear").alpha(t))
    torch.testing.assert_close(Schedule("linear").weight(t), signal_to_noise + 1)


@all_schedules
def test_corrupt_at_both_ends_and_in_between(schedule: Schedule) -> None:
    x0 = torch.arange(40_000).view(2, -1) % 7
    generate = torch.rand(x0.shape, generator=seeded(1)) < 0.5
    noise = torch.rand(x0.shape, generator=seeded(2))
    for t, rate in ((0.0, 0.0), (0.3, 1 - float(schedule.alpha(torch.tensor(0.3)))), (1.0, 1.0)):
        xt, masked = corrupt(x0, torch.full(x0.shape, t), generate, mask_id=9, noise=noise, schedule=schedule)
        assert torch.equal(xt == 9, masked)
        assert torch.equal(xt[~masked], x0[~masked])
        assert not bool((masked & ~generate).any())
        n = int(generate.sum())
        assert abs(float(masked.sum()) / n - rate) <= 4 * math.sqrt(rate * (1 - rate) / n)


def test_corrupt_takes_a_level_for_each_position() -> None:
    x0, t = torch.zeros(1, 4, dtype=torch.long), torch.tensor([[0.0, 0.4, 0.6, 1.0]])
    everywhere, noise = torch.ones(1, 4, dtype=torch.bool), torch.full((1, 4), 0.5)
    xt, masked = corrupt(x0, t, everywhere, mask_id=3, noise=noise)
    assert masked.tolist() == [[False, False, True, True]] and xt.tolist() == [[0, 0, 3, 3]]


def check_bound(toy: Any, given: list[int], schedule: Schedule) -> None:
    """`nelbo` of every state that agrees with `given` (mask_id: generated) against the enumerated -log p.

    A state may be six standard errors off, all of them together four. Of two positions 32 levels are half with one
    masked, half with both, and each position is as often masked as the other: that estimate has no error but rounding.
    """
    pattern = torch.tensor(given)
    truth = -toy.conditional(pattern).log()
    states, truth = toy.states[truth.isfinite()], truth[truth.isfinite()]
    repeats = 4096 // len(states)
    x0 = states.repeat_interleave(repeats, 0)
    generate = (pattern == toy.mask_id).expand(len(x0), -1)
    found = nelbo(toy, x0, generate, mask_id=toy.mask_id, n_times=32, generator=seeded(3), schedule=schedule)
    off = found.view(len(states), repeats) - truth.unsqueeze(1)
    assert float((off.mean(1) / off.std(1).clamp(min=1e-5)).abs().max()) * math.sqrt(repeats) < 6
    error = float(off.std(1).square().mean().sqrt()) / math.sqrt(off.numel())
    assert abs(float(off.mean())) < 4 * error + 1e-5 and error < 0.025 * float(truth.mean())
    for ids, t in toy.seen:
        assert torch.equal(ids[~generate], x0[~generate]) and not bool(t[~generate].any())


@one_of_each
@both_masks
def test_nelbo_of_an_exact_denoiser_is_the_likelihood(
    toy: Callable[..., Any], mask_id: int, schedule: Schedule
) -> None:
    check_bound(toy(mask_id=mask_id), [mask_id] * 3, schedule)


@one_of_each
def test_conditional_nelbo_is_the_conditional_likelihood(toy: Callable[..., Any], schedule: Schedule) -> None:
    check_bound(toy(length=4, values=3, mask_id=3), [3, 2, 3, 3], schedule)
    check_bound(toy(length=4, values=3, mask_id=1), [1, 2, 0, 1], schedule)


def test_nelbo_of_a_wrong_denoiser_is_larger(toy: Callable[..., Any]) -> None:
    right, wrong = toy(seed=0), toy(seed=1)
    x0 = right.states[torch.multinomial(right.p, 4000, replacement=True, generator=seeded(5))]
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    bound = nelbo(wrong, x0, everywhere, mask_id=4, n_times=8, generator=seeded(6))
    entropy = -float((right.p * right.p.log()).sum())
    cross = -float((right.p * wrong.p.log()).sum())  # the wrong denoiser is the exact posterior of another joint
    error = float(bound.std()) / math.sqrt(len(x0))
    assert abs(float(bound.mean()) - cross) < 4 * error
    assert float(bound.mean()) > entropy + 10 * error


def test_nelbo_tokens_sum_to_nelbo_and_are_zero_at_given_positions(toy: Callable[..., Any]) -> None:
    it = toy()
    generate = torch.tensor([[True, False, True]]).expand(5, -1)
    terms = nelbo_tokens(it, it.states[:5], generate, mask_id=4, n_times=7, generator=seeded())
    total = nelbo(it, it.states[:5], generate, mask_id=4, n_times=7, generator=seeded())
    assert terms.shape == (7, 5, 3) and not bool(terms[:, :, 1].any())
    torch.testing.assert_close(terms.mean(0).sum(1), total)


def test_noise_levels_of_a_bound_are_stratified_and_shared(toy: Callable[..., Any]) -> None:
    it = toy()
    everywhere = torch.ones(64, 3, dtype=torch.bool)
    nelbo(it, it.states, everywhere, mask_id=4, n_times=4, generator=seeded())
    for stratum, (ids, t) in enumerate(it.seen):
        assert torch.equal(t, t[:, :1].expand(-1, 3))
        masked = (ids == 4).sum(1)
        torch.testing.assert_close(t[:, 0], masked / 3)  # told the level at which that share is masked
        assert int(3 * stratum / 4) + 1 <= int(masked.min()) and int(masked.max()) <= -(-3 * (stratum + 1) // 4)


def trained_on_six_positions() -> tuple[torch.nn.Module, torch.Tensor]:
    """A network of ids and noise level on six positions of four values, trained for a second or two, and its data."""
    torch.manual_seed(0)
    data = torch.randint(4, (64, 1)) + torch.tensor([0, 1, 0, 2, 3, 0])
    data = torch.where(torch.rand(data.shape) < 0.3, torch.randint(4, data.shape), data % 4)

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(torch.nn.Linear(6 * 5 + 1, 64), torch.nn.GELU(), torch.nn.Linear(64, 24))

        def forward(self, ids: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            seen = torch.nn.functional.one_hot(ids, 5).flatten(1).float()
            return self.body(torch.cat([seen, t.mean(1, keepdim=True)], 1)).view(-1, 6, 4)

    network = Network()
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(300):
        t = torch.rand(len(data), 1).expand(-1, 6)
        ids, masked = corrupt(data, t, torch.ones_like(data, dtype=torch.bool), mask_id=4, noise=torch.rand(data.shape))
        loss = torch.nn.functional.cross_entropy(network(ids, t)[masked], data[masked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network, data[:4]


def every_pattern(network: torch.nn.Module, x0: torch.Tensor) -> torch.Tensor:
    """LLaDA eq. 6 without drawing: sum over l = 1..L of 1/l times the mean over masks of l positions of their NLL."""
    length = x0.shape[1]
    total = torch.zeros(len(x0))
    for pattern in range(1, 2**length):
        masked = torch.tensor([bool(pattern >> i & 1) for i in range(length)])
        count = int(masked.sum())
        with torch.no_grad():
            logits = network(torch.where(masked, 4, x0), torch.full(x0.shape, count / length))
        nll = -logits.log_softmax(-1).gather(2, x0.unsqueeze(2)).squeeze(2)
        total += nll[:, masked].sum(1) / count / math.comb(length, count)
    return total


def test_nelbo_of_a_trained_network_is_the_average_over_all_masks() -> None:
    """Unbiased, whether or not the levels divide the counts, and of less variance than masks drawn independently."""
    network, x0 = trained_on_six_positions()
    truth, repeats, variance = every_pattern(network, x0), 40_000, {}
    rows = x0.repeat_interleave(repeats, 0)
    everywhere = torch.ones_like(rows, dtype=torch.bool)
    for n_times in (1, 4, 6, 9):
        found = nelbo(network, rows, everywhere, mask_id=4, n_times=n_times, generator=seeded(77 + n_times))
        found = found.view(4, -1).double()
        error = found.std(1) / math.sqrt(repeats)
        assert float(((found.mean(1) - truth) / error).abs().max()) < 3
        assert float((error / truth).max()) < 0.006
        variance[n_times] = found.var(1)
    # n_times = 1 is a level and a mask drawn afresh; the mean of six of those has a sixth of its variance
    ratio = variance[6] / (variance[1] / 6)
    assert float(ratio.mean()) < 0.5 and float(ratio.max()) < 1.05  # measured: 0.01, 0.30, 0.33 and 0.96


def test_masks_take_turns_and_a_rows_noise_is_its_own() -> None:
    generate = torch.ones(2, 7, dtype=torch.bool)
    generate[1, [0, 3, 4, 6]] = False
    counts, order = mask_orders(generate, 6, [seeded(1), seeded(2)])
    assert sorted(counts[:, 1].tolist()) == [1, 1, 2, 2, 3, 3]
    masked = order < counts.unsqueeze(2)
    assert torch.equal(masked.sum(2), counts) and not bool((masked & ~generate).any())
    covered = masked.sum(0)
    assert int(covered[0].max() - covered[0].min()) <= 1  # as even as it can be
    assert covered[1][generate[1]].tolist() == [4, 4, 4]
    alone = mask_orders(torch.cat([generate[1:], torch.zeros(1, 3, dtype=torch.bool)], 1), 6, seeded(2))
    assert torch.equal(alone[0][:, 0], counts[:, 1])
    assert torch.equal((alone[1] < alone[0].unsqueeze(2))[:, 0, :7], masked[:, 1])
    with pytest.raises(ValueError, match="1 generators for 2 rows"):
        mask_orders(generate, 2, [seeded()])


def test_levels_at_once_change_nothing_and_unknown_positions_are_told_so(toy: Callable[..., Any]) -> None:
    it = toy(length=4)
    x0 = it.states[:5].clone()
    x0[:, 3] = 4  # [MASK] outside what is generated: unknown
    generate = torch.tensor([True, True, True, False]).expand(5, -1)
    runs = [
        nelbo_tokens(it, x0, generate, mask_id=4, n_times=5, generator=seeded(), at_once=size) for size in (1, 2, 5)
    ]
    torch.testing.assert_close(runs[1], runs[0])
    torch.testing.assert_close(runs[2], runs[0])
    assert [len(ids) for ids, _ in it.seen] == [5] * 5 + [10, 10, 5] + [25]
    assert all(bool((t[:, 3] == 1).all()) and bool((ids[:, 3] == 4).all()) for ids, t in it.seen)


@both_masks
def test_predict_never_gives_mask_a_probability(toy: Callable[..., Any], mask_id: int) -> None:
    it = toy(mask_id=mask_id)
    ids = torch.full((2, 3), mask_id)
    (log_p,) = predict(it, ids, torch.ones(2, 3), [Group(torch.tensor([1, 5]), 0, it.columns)], mask_id=mask_id)
    torch.testing.assert_close(log_p.exp(), it.marginals(ids).flatten(0, 1)[[1, 5]])
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(2))


def test_token_nll_of_groups_with_other_columns() -> None:
    logits = torch.randn(1, 3, 6, generator=seeded())
    groups = [Group(torch.tensor([0]), 0, 2), Group(torch.tensor([2]), 3, 6)]
    x0 = torch.tensor([[1, 0, 4]])
    nll = token_nll(lambda ids, t: logits, x0, torch.zeros(1, 3), x0, groups, mask_id=5)
    assert nll[0, 1] == 0
    assert float(nll[0, 0]) == pytest.approx(-float(logits[0, 0, :2].log_softmax(0)[1]), rel=1e-5)
    assert float(nll[0, 2]) == pytest.approx(-float(logits[0, 2, 3:5].log_softmax(0)[1]), rel=1e-5)
