"""Plans against distributions small enough to enumerate: exact where they say so, and as far off as the page says."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medim.diffusion import Schedule
from medim.sampling import REVEALS, Means, Plan, sample

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("make_sampling_tables", ROOT / "docs" / "make_sampling_tables.py")
assert spec is not None and spec.loader is not None
tables = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = tables  # dataclasses look their module up
spec.loader.exec_module(tables)

ROWS = 20_000
every_plan = pytest.mark.parametrize("name", tables.PLANS)
both_masks = pytest.mark.parametrize("mask_id", [4, 1], ids=["mask without column", "mask in a column"])


@pytest.fixture(scope="module")
def table() -> dict[str, list[str]]:
    """The rows of docs/sampling.md, cells by plan."""
    block = tables.PAGE.read_text().split(tables.HEADER, 1)[1].split("\n\n", 1)[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()[2:]]
    return {row[0]: row[1:] for row in rows}


@every_plan
def test_a_plan_is_as_exact_as_it_claims_and_as_the_page_says(name: str, table: dict[str, list[str]]) -> None:
    entry, it = tables.PLANS[name], tables.toy()
    free, tied = (tables.measure(it, entry, given, ROWS) for given in tables.GIVEN.values())
    if tables.exact(entry):
        assert free.p > 1e-3 and tied.p > 1e-3
        assert free.passes == 6
    elif name in tables.IN_THE_LIMIT:
        assert free.p > 1e-3 and tied.p > 1e-3
    else:
        assert free.p < 1e-6 and free.tv < 0.4 and tied.tv < 0.4
    claim, passes, *figures = table[name]
    assert (claim, int(passes)) == ("yes" if tables.exact(entry) else "no", free.passes)
    assert [float(figure) for figure in figures[:2]] == pytest.approx([free.tv, tied.tv], abs=0.01)


@pytest.mark.parametrize("generated", [[True] * 3, [True, False, True]])
def test_expected_vectors(toy: Callable[..., Any], generated: list[bool]) -> None:
    """In one pass those of the marginals; over exact draws in several passes the same in the mean (tower rule)."""
    it, table = toy(), torch.randn(4, 2, generator=torch.Generator().manual_seed(1))
    given = torch.tensor([4 if made else 2 for made in generated])
    generate, canvas = torch.tensor(generated).expand(ROWS, 3), given.expand(ROWS, 3)
    wanted = it.marginals(given[None])[0] @ table
    wanted[~torch.tensor(generated)] = 0
    for plan, tolerance in (
        (Plan("confidence", steps=1, temperature=0.0), 1e-5),
        (Plan("ancestral", steps=None), 0.03),
    ):
        means = Means(table, 0)
        sample(it, canvas, generate, plan, mask_id=4, generator=torch.Generator().manual_seed(0), means=means)
        assert means.values is not None
        assert torch.allclose(means.values.mean(0), wanted, atol=tolerance)
    assert means.values.std(0).max() > 0.01  # what was revealed before is known
    other = Means(table, 7)  # the columns of no group
    sample(it, canvas[:2], generate[:2], plan, mask_id=4, generator=torch.Generator().manual_seed(0), means=other)
    assert other.values is not None and not other.values.any()


def test_the_page_lists_every_plan_and_no_other(table: dict[str, list[str]]) -> None:
    assert list(table) == list(tables.PLANS)
    measured = {p.name for entry in tables.PLANS.values() for p in ([entry] if isinstance(entry, Plan) else entry)}
    assert measured == set(REVEALS)


def test_many_steps_of_remasking_draw_from_the_true_distribution() -> None:
    """sigma of the order of 1/steps: positions are masked again about once, and the distribution stays right."""
    for options in (
        {"remask": "rescale", "remask_eta": 0.007, "remask_from": 0.7},
        {"remask": "cap", "remask_eta": 0.007, "remask_from": 0.6, "remask_to": 0.1, "remask_hold": 0.7},
    ):
        plan, it = Plan("ancestral", steps=150, **options), tables.toy()
        for given in tables.GIVEN.values():
            assert tables.measure(it, plan, given, 10_000).p > 1e-3


def test_what_an_entropy_bound_loses_is_bounded() -> None:
    """A pass's reveals lose at most gamma nats, so KL(p || drawn) <= gamma passes: here by enumeration."""
    gamma, it = 0.7, tables.toy()
    state = torch.full_like(it.states, 5)
    plan, log_q = Plan("entropy", steps=None, gamma=gamma), torch.zeros(len(state))
    passes = 0
    while bool((masked := state == 5).any()):
        passes += 1
        p = it.marginals(state)
        entropy = torch.where(masked, torch.special.entr(p).sum(-1), torch.inf)
        ranked = entropy.sort(1).values
        count = ((ranked.cumsum(1) - ranked <= plan.gamma) & ranked.isfinite()).sum(1, keepdim=True)
        chosen = entropy.argsort(dim=1, stable=True).argsort(dim=1) < count
        own = p.gather(2, it.states.unsqueeze(2)).squeeze(2).log()
        log_q += torch.where(chosen, own, 0.0).sum(1)
        state = torch.where(chosen, it.states, state)
    assert float(log_q.exp().sum()) == pytest.approx(1, abs=1e-4)
    assert 0.01 < float((it.p * (it.p.log() - log_q)).sum()) < gamma * passes
    assert passes < 6
    ids = draw(it, [5] * 6, plan)
    assert p_value(it.count(ids), log_q.exp()) > 1e-3


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(toy: Any, given: list[int], plan: Plan, rows: int = ROWS, **options: Any) -> Tensor:
    """Rows that start from `given`; [MASK] there is generated."""
    canvas = torch.tensor(given).expand(rows, -1)
    options = {"generator": seeded(1), "mask_id": toy.mask_id, **options}
    return sample(toy, canvas, canvas == toy.mask_id, plan, **options)


def p_value(counts: np.ndarray, p: Tensor) -> float:
    return tables.p_value(counts, p.double().numpy())


@both_masks
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ancestral_draws_from_the_true_distribution(toy: Callable[..., Any], mask_id: int, schedule: Any) -> None:
    it = toy(mask_id=mask_id)
    ids = draw(it, [mask_id] * 3, Plan("ancestral", steps=None, schedule=schedule))
    assert p_value(it.count(ids), it.p) > 1e-3


@pytest.mark.parametrize("name", ["ancestral", "halton"])
def test_with_more_steps_than_positions_it_is_exact(toy: Callable[..., Any], name: Any) -> None:
    it, order = toy(), torch.tensor([2, 0, 1]).expand(ROWS, -1)
    ids = draw(it, [4] * 3, Plan(name, steps=64), order=order)
    assert p_value(it.count(ids), it.p) > 1e-3
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


def test_an_annealed_temperature_follows_the_share_that_is_masked(toy: Callable[..., Any]) -> None:
    """Two positions, left first: T = 0.4 + 1.2 m/2 with m = 2, then 1."""
    it, order = toy(length=2), torch.tensor([0, 1]).expand(ROWS, -1)
    first = it.p.view(4, 4).sum(1) ** (1 / 1.6)
    second = it.p.view(4, 4) ** 1.0
    wanted = (first / first.sum()).unsqueeze(1) * second / second.sum(1, keepdim=True)
    ids = draw(it, [4] * 2, Plan("halton", None, temperature=1.6, temperature_end=0.4), order=order)
    assert p_value(it.count(ids), wanted.flatten()) > 1e-3


def test_filters_draw_from_what_they_leave(toy: Callable[..., Any]) -> None:
    it = toy(length=1, values=4)
    ranked, order = it.p.sort(descending=True)
    for kept, plan in (
        (3, Plan(top_k=3)),
        (2, Plan(top_p=float(ranked[0]) + 0.01)),
        (1, Plan(top_p=float(ranked[0]) - 0.01)),
        (4, Plan(top_k=9)),
        (2, Plan(top_k=3, top_p=float(ranked[:2].sum() / ranked[:3].sum()) - 0.01)),
    ):
        wanted = torch.zeros(4).index_copy(0, order[:kept], ranked[:kept] / ranked[:kept].sum())
        assert p_value(it.count(draw(it, [4], plan)), wanted) > 1e-3 or kept == 1
        assert set(np.flatnonzero(it.count(draw(it, [4], plan)))) == set(order[:kept].tolist())


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


def guided(joint: Tensor, scale: float) -> Tensor:
    """p(b | c=2)^(1+w) / p(b)^w, normalised, from p(c, b) over the last two dimensions."""
    conditional = joint[..., 2, :] / joint[..., 2, :].sum(-1, keepdim=True)
    marginal = joint.sum(-2) / joint.sum((-2, -1)).unsqueeze(-1)
    wanted = conditional ** (1 + scale) / marginal**scale
    return wanted / wanted.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("options", "scales", "calls"),
    [
        ({}, (1.5, 1.5), [2, 2]),
        ({"guidance_schedule": "linear"}, (0.0, 0.75), [1, 2]),
        ({"guidance_from": 0.6}, (0.0, 1.5), [1, 2]),
        ({"guidance_from": 0.4}, (0.0, 0.0), [1, 1]),
    ],
    ids=["constant", "linear", "late window", "window never reached"],
)
def test_guidance_schedules_are_their_closed_form(
    toy: Callable[..., Any], options: dict[str, Any], scales: tuple[float, float], calls: list[int]
) -> None:
    """Positions (c, a, b): c given, a revealed at t=1, b at t=1/2. Passes in which no row is guided run one branch."""
    it = toy(seed=5, sharpness=1.5)
    joint, order = it.p.view(4, 4, 4), torch.tensor([-1, 0, 1]).expand(ROWS, -1)
    first = guided(joint.sum(2), scales[0])
    second = guided(joint.transpose(0, 1), scales[1])  # [a, b]
    condition = torch.tensor([True, False, False]).expand(ROWS, -1)
    plan = Plan("halton", steps=None, guidance=1.5, **options)
    ids = draw(it, [2, 4, 4], plan, order=order, condition=condition)
    counts = np.bincount((4 * ids[:, 1] + ids[:, 2]).numpy(), minlength=16)
    assert p_value(counts, (first.unsqueeze(1) * second).flatten()) > 1e-3
    assert [len(ids) // ROWS for ids, _ in it.seen] == calls


def test_each_plan_on_a_canvas_has_its_own_guidance(toy: Callable[..., Any]) -> None:
    """Positions (c, a, b) in one pass, c given: a and b independent, each with its modality's scale."""
    it = toy(ids=[[0, 1, 2], [0, 1, 2], [3, 4]], mask_id=5, seed=5, sharpness=1.5)
    canvas = torch.tensor([2, 5, 5]).expand(ROWS, -1)
    place, joint = torch.arange(3).expand(ROWS, -1), it.p.view(3, 3, 2)
    plans = [(Plan("halton", 1, guidance=2.0), place == 1), (Plan(steps=1, guidance=0.5), place == 2)]
    options = {"mask_id": 5, "condition": place == 0, "order": torch.zeros_like(place)}
    ids = sample(it, canvas, canvas == 5, plans, generator=seeded(1), **options)
    wanted = guided(joint.sum(2), 2.0).unsqueeze(1) * guided(joint.sum(1), 0.5)
    counts = np.bincount((2 * ids[:, 1] + ids[:, 2] - 3).numpy(), minlength=6)
    assert p_value(counts, wanted.flatten()) > 1e-3
    plans[1] = (Plan(steps=1), place == 2)
    alone = sample(it, canvas, canvas == 5, plans, generator=seeded(1), **options)
    assert p_value(np.bincount(alone[:, 2].numpy() - 3, minlength=2), guided(joint.sum(1), 0.0)) > 1e-3
