"""The sampling loop: exact where it says so, by enumerated distributions; rows that ignore their neighbours."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from medim.diffusion import Schedule
from medim.sampling import Cost, Plan, sample

ROWS = 20_000
PLANS = {
    "ancestral": Plan("ancestral", steps=None),
    "ancestral, 5 steps": Plan("ancestral", steps=5),
    "ancestral, cosine": Plan("ancestral", steps=4, schedule="cosine"),
    "confidence": Plan("confidence", steps=5, schedule="cosine"),
    "confidence, all": Plan("confidence", steps=None),
}
all_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
both_masks = pytest.mark.parametrize("mask_id", [4, 1], ids=["mask without column", "mask in a column"])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(toy: Any, given: list[int], plan: Plan, rows: int = ROWS, **options: Any) -> Tensor:
    """Rows that start from `given`; [MASK] there is generated."""
    canvas = torch.tensor(given).expand(rows, -1)
    options = {"generator": seeded(1), "mask_id": toy.mask_id, **options}
    return sample(toy, canvas, canvas == toy.mask_id, plan, **options)


def p_value(counts: np.ndarray, p: Tensor) -> float:
    """Chi-square of counts against probabilities; cells of probability zero must be empty."""
    possible = p.numpy() > 0
    assert not counts[~possible].any()
    expected = p.double().numpy()[possible]
    return float(chisquare(counts[possible], expected / expected.sum() * counts.sum()).pvalue)


@both_masks
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_draws_from_the_true_distribution(toy: Callable[..., Any], mask_id: int, schedule: Any) -> None:
    it = toy(mask_id=mask_id)
    ids = draw(it, [mask_id] * 3, Plan("ancestral", steps=None, schedule=schedule))
    assert p_value(it.count(ids), it.p) > 1e-3


def test_ancestral_with_more_steps_than_positions_is_exact(toy: Callable[..., Any]) -> None:
    it = toy()
    assert p_value(it.count(draw(it, [4] * 3, Plan("ancestral", steps=64))), it.p) > 1e-3
    assert len(it.seen) == 3


@both_masks
def test_conditional_ancestral_is_exact(toy: Callable[..., Any], mask_id: int) -> None:
    it = toy(mask_id=mask_id)
    given = [mask_id, 2, mask_id]
    ids = draw(it, given, Plan("ancestral", steps=None))
    assert p_value(it.count(ids), it.conditional(torch.tensor(given))) > 1e-3


@pytest.mark.parametrize(("steps", "schedule"), [(1, "linear"), (2, "linear"), (2, "cosine")])
def test_few_steps_draw_from_the_distribution_they_should(toy: Callable[..., Any], steps: int, schedule: Any) -> None:
    """With 2 steps a set A comes first, from its marginals; the rest follows from its marginals given A."""
    it = toy(seed=2)
    first = float(Schedule(schedule).alpha(torch.tensor(0.5))) if steps == 2 else 1.0
    expected = torch.zeros_like(it.p)
    blank = torch.full_like(it.states, 4)
    at_once = it.marginals(blank).gather(2, it.states.unsqueeze(2)).squeeze(2)
    for chosen in itertools.product([True, False], repeat=3):
        a = torch.tensor(chosen)
        later = it.marginals(torch.where(a, it.states, blank)).gather(2, it.states.unsqueeze(2)).squeeze(2)
        weight = first ** sum(chosen) * (1 - first) ** (3 - sum(chosen))
        expected += weight * at_once[:, a].prod(1) * later[:, ~a].prod(1)
    counts = it.count(draw(it, [4] * 3, Plan("ancestral", steps=steps, schedule=schedule)))
    assert p_value(counts, expected) > 1e-3
    assert p_value(counts, it.p) < 1e-6  # and that is not the true one


def test_temperature(toy: Callable[..., Any]) -> None:
    it = toy(length=1, values=4)
    for temperature in (0.5, 2.0):
        wanted = it.p ** (1 / temperature)
        counts = it.count(draw(it, [4], Plan("ancestral", temperature=temperature)))
        assert p_value(counts, wanted / wanted.sum()) > 1e-3
    greedy = draw(it, [4], Plan("ancestral", temperature=0.0), rows=50)
    assert bool((greedy == it.states[it.p.argmax()]).all())


@pytest.mark.parametrize("scale", [0.7, 2.0])
def test_guidance_is_its_closed_form(toy: Callable[..., Any], scale: float) -> None:
    it = toy(length=2, values=4, seed=5, sharpness=2.0)
    joint = it.p.view(4, 4)  # [condition, value]
    conditional, marginal = joint[2] / joint[2].sum(), joint.sum(0)
    wanted = conditional ** (1 + scale) / marginal**scale
    condition = torch.tensor([True, False]).expand(ROWS, -1)
    ids = draw(it, [2, 4], Plan("ancestral", guidance=scale), condition=condition)
    assert bool((ids[:, 0] == 2).all())
    assert p_value(np.bincount(ids[:, 1].numpy(), minlength=4), wanted / wanted.sum()) > 1e-3
    ids_seen, t_seen = it.seen[0]
    assert len(ids_seen) == 2 * ROWS  # one batched pass, the second half without the condition
    assert ids_seen[0].tolist() == [2, 4] and ids_seen[-1].tolist() == [4, 4]
    assert t_seen[0, 0] == 0 and t_seen[-1, 0] == 1 and torch.equal(t_seen[:ROWS, 1], t_seen[ROWS:, 1])


@all_plans
def test_guidance_of_zero_is_none(toy: Callable[..., Any], plan: Plan) -> None:
    it = toy(length=4)
    condition = torch.tensor([True, False, False, False]).expand(200, -1)
    plain = draw(it, [2, 4, 4, 4], plan, rows=200)
    assert torch.equal(plain, draw(it, [2, 4, 4, 4], plan, rows=200, condition=condition))
    almost = Plan(**{**vars(plan), "guidance": 1e-9})
    assert torch.equal(plain, draw(it, [2, 4, 4, 4], almost, rows=200, condition=condition))


class Hashing:
    """Any length: a position's logits depend on its place, its noise level and all that is revealed in its row."""

    def __init__(self, values: int = 5) -> None:
        self.values, generator = values, seeded(7)
        self.table = torch.randn(97, values, generator=generator)
        self.place = torch.randn(64, values, generator=generator)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, t: Tensor) -> Tensor:
        self.seen.append((ids.clone(), t.clone()))
        known = torch.where(ids < self.values, (ids + 1) * (torch.arange(ids.shape[1]) ** 2 + 1), 0).sum(1)
        return (
            self.table[known % 97].unsqueeze(1)
            + self.place[: ids.shape[1]]
            + 3 * t.unsqueeze(2) * self.place.flip(0)[:1]
        )


MASK, PADDING = 5, 6  # ids of a Hashing's canvas beyond its values


def canvases() -> list[Tensor]:
    """Rows with 3, 20, 7 and 12 generated positions, some given ones among them."""
    rows = []
    for n in (3, 20, 7, 12):
        row = torch.full((n + 4,), MASK)
        row[[0, 2, n, n + 3]] = torch.tensor([1, 0, 4, 2])
        rows.append(row)
    return rows


def padded(rows: list[Tensor], length: int) -> Tensor:
    return torch.stack([torch.cat([row, torch.full((length - len(row),), PADDING)]) for row in rows])


@all_plans
def test_ends_without_masks_in_at_most_its_steps_and_keeps_what_is_given(plan: Plan) -> None:
    denoiser, canvas, cost = Hashing(), padded(canvases(), 30), Cost(forward_passes=2)
    told: list[tuple[int, int]] = []
    generate = canvas == MASK
    out = sample(
        denoiser, canvas, generate, plan, mask_id=MASK, generator=seeded(), cost=cost,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert bool((out[generate] < 5).all()) and torch.equal(out[~generate], canvas[~generate])
    passes = len(denoiser.seen)
    assert passes <= (plan.steps or 20)
    assert cost == Cost(passes + 2, passes * canvas.numel())
    assert told == [(k + 1, passes) for k in range(passes)]
    left = torch.stack([(ids == MASK).sum(1) for ids, _ in denoiser.seen])
    assert bool((left.diff(dim=0) <= 0).all()) and bool((left.sum(1).diff() < 0).all())  # no pass is idle
    for ids, t in denoiser.seen:
        assert torch.equal(ids[~generate], canvas[~generate]) and not bool(t[~generate].any())
        assert bool(((t >= 0) & (t <= 1.00001)).all())
    guided = Plan(**{**vars(plan), "guidance": 1.0})
    condition = torch.zeros_like(generate).index_fill(1, torch.tensor([0]), True)
    twice = Cost()
    sample(denoiser, canvas, generate, guided, mask_id=MASK, generator=seeded(), condition=condition, cost=twice)
    assert twice.active_tokens == 2 * twice.forward_passes * canvas.numel()


def test_a_mask_that_is_not_generated_is_told_to_be_unknown() -> None:
    denoiser, canvas = Hashing(), torch.tensor([[1, MASK, MASK, 2]])
    generate = torch.tensor([[False, True, False, False]])
    out = sample(denoiser, canvas, generate, Plan(), mask_id=MASK, generator=seeded())
    assert out[0, 2] == MASK and out[0, 1] < 5
    assert denoiser.seen[0][1][0, [0, 2, 3]].tolist() == [0, 1, 0]


def test_nothing_to_generate_costs_nothing() -> None:
    denoiser, canvas, cost = Hashing(), torch.tensor([[1, 2]]), Cost()
    nothing = torch.zeros(1, 2, dtype=torch.bool)
    assert torch.equal(sample(denoiser, canvas, nothing, Plan(), mask_id=5, generator=seeded(), cost=cost), canvas)
    assert cost == Cost() and not denoiser.seen


@all_plans
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_a_row_depends_neither_on_its_neighbours_nor_on_padding(plan: Plan, scale: float) -> None:
    """Two calls one after the other on the same generators, as a pair is made of a report and an image."""
    plan = Plan(**{**vars(plan), "guidance": scale})

    def run(rows: list[Tensor], numbers: list[int], length: int) -> list[Tensor]:
        canvas, generators = padded(rows, length), [seeded(100 + i) for i in numbers]
        even = (torch.arange(length) % 2 == 0).expand(canvas.shape)
        condition = torch.zeros_like(even).index_fill(1, torch.tensor([0]), True)
        todo = canvas == MASK
        for part in (todo & even, todo & ~even):
            canvas = sample(Hashing(), canvas, part, plan, mask_id=MASK, generator=generators, condition=condition)
        return [row[: len(start)] for row, start in zip(canvas, rows, strict=True)]

    rows = canvases()
    together = run(rows, [0, 1, 2, 3], 24)
    for i, row in enumerate(rows):
        assert torch.equal(run([row], [i], len(row))[0], together[i])
        assert torch.equal(run([row, rows[2]], [i, 9], 40)[0], together[i])
    assert not torch.equal(run([rows[1]], [5], 24)[0], together[1])  # and it does depend on its seed


@all_plans
def test_the_same_seed_gives_the_same_rows(plan: Plan) -> None:
    canvas = padded(canvases(), 24)

    def run(seed: int) -> Tensor:
        return sample(Hashing(), canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded(seed))

    assert torch.equal(run(3), run(3)) and not torch.equal(run(3), run(4))


@pytest.mark.parametrize("trained", [Schedule("linear"), Schedule("cosine")], ids=lambda s: f"trained {s.name}")
@pytest.mark.parametrize(
    ("pace", "steps", "left"),
    [("cosine", 4, [12, 11, 8, 4]), ("linear", 4, [12, 9, 6, 3]), ("linear", None, list(range(12, 0, -1)))],
)
def test_confidence_reveals_as_many_as_scheduled(
    pace: Any, steps: int | None, left: list[int], trained: Schedule
) -> None:
    """12 sin(pi/2 x) for x = 3/4, 1/2, 1/4 is 11.09, 8.49, 4.59; told is training's level of that share."""
    denoiser, canvas = Hashing(), torch.full((3, 12), MASK)
    plan = Plan("confidence", steps=steps, schedule=pace)
    sample(denoiser, canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded(), schedule=trained)
    assert [(ids == MASK).sum(1).tolist() for ids, _ in denoiser.seen] == [[n] * 3 for n in left]
    for (_, t), n in zip(denoiser.seen, left, strict=True):
        share = 1 - trained.alpha(t)
        torch.testing.assert_close(share, torch.full_like(share, n / 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [Schedule("linear"), Schedule("cosine")], ids=lambda s: f"trained {s.name}")
@pytest.mark.parametrize(("pace", "steps"), [("linear", 6), ("cosine", 6), ("linear", None)])
def test_ancestral_tells_the_level_at_which_so_many_are_masked(pace: Any, trained: Schedule, steps: int | None) -> None:
    denoiser, canvas = Hashing(), torch.full((150, 50), MASK)
    plan = Plan("ancestral", steps=steps, schedule=pace)
    sample(denoiser, canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded(), schedule=trained)
    for ids, t in denoiser.seen:
        share, masked = (1 - trained.alpha(t)).mean(), (ids == MASK).float().mean()
        assert abs(float(share - masked)) < 0.03


def test_confidence_takes_the_most_probable_first() -> None:
    logits = torch.zeros(6, 5)
    logits[range(6), [3, 1, 4, 0, 2, 2]] = torch.tensor([2.0, 6.0, 1.0, 5.0, 3.0, 4.0])
    seen: list[list[int]] = []

    def denoiser(ids: Tensor, t: Tensor) -> Tensor:
        seen.append(ids[0].tolist())
        return logits.unsqueeze(0)

    canvas = torch.full((1, 6), MASK)
    plan = Plan("confidence", steps=3, temperature=0.0, choice_temperature=0.0)
    out = sample(denoiser, canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded())
    assert out.tolist() == [[3, 1, 4, 0, 2, 2]]
    assert seen[1:] == [[5, 1, 5, 0, 5, 5], [5, 1, 5, 0, 2, 2]]


def test_mistakes() -> None:
    canvas = torch.full((2, 3), MASK)
    with pytest.raises(ValueError, match="guidance needs"):
        sample(Hashing(), canvas, canvas == MASK, Plan(guidance=1.0), mask_id=MASK, generator=seeded())
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        sample(Hashing(), canvas, canvas == MASK, Plan(), mask_id=MASK, generator=[seeded()] * 3)
    with pytest.raises((ValueError, TypeError)):  # under pytest the check of types comes first
        Plan("x")  # type: ignore[arg-type]
    wrong: list[dict[str, Any]] = [{"steps": 0}, {"temperature": -1.0}, {"choice_temperature": -0.1}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"at least one step|not negative"):
            Plan(**options)
