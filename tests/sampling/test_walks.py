"""What each kind of plan reveals, and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from medim.diffusion import Schedule
from medim.sampling import Plan, halton_order, sample

MASK = 5


class Flat:
    """The same logits whatever it is given; random ones unless told."""

    def __init__(self, logits: Tensor | None = None) -> None:
        self.logits = torch.randn(64, 5, generator=seeded(7)) if logits is None else logits
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, ids: Tensor, t: Tensor) -> Tensor:
        self.seen.append((ids.clone(), t.clone()))
        return self.logits[: ids.shape[1]].expand(*ids.shape, -1)

    @property
    def masked(self) -> list[list[list[int]]]:
        """The masked positions of each row before each pass."""
        return [[row.nonzero().squeeze(1).tolist() for row in ids == MASK] for ids, _ in self.seen]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def run(plan: Plan, denoiser: Any, rows: int, length: int, **options: Any) -> Tensor:
    canvas = torch.full((rows, length), MASK)
    return sample(denoiser, canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded(), **options)


def sure(*certainty: float) -> Tensor:
    """Logits of two likely values at each position: the first with this probability, the second with the rest."""
    p = torch.tensor(certainty)
    return torch.stack([p, 1 - p, *[torch.zeros_like(p)] * 3], 1).log()


@pytest.mark.parametrize("trained", [Schedule("linear"), Schedule("cosine")], ids=lambda s: f"trained {s.name}")
@pytest.mark.parametrize(
    ("pace", "steps", "left"),
    [("cosine", 4, [12, 11, 8, 4]), ("linear", 4, [12, 9, 6, 3]), ("linear", None, list(range(12, 0, -1)))],
)
def test_confidence_reveals_as_many_as_scheduled(
    pace: Any, steps: int | None, left: list[int], trained: Schedule
) -> None:
    """12 sin(pi/2 x) for x = 3/4, 1/2, 1/4 is 11.09, 8.49, 4.59; told is training's level of that share."""
    denoiser, canvas = Flat(), torch.full((3, 12), MASK)
    plan = Plan("confidence", steps=steps, schedule=pace)
    sample(denoiser, canvas, canvas == MASK, plan, mask_id=MASK, generator=seeded(), schedule=trained)
    assert [(ids == MASK).sum(1).tolist() for ids, _ in denoiser.seen] == [[n] * 3 for n in left]
    for (_, t), n in zip(denoiser.seen, left, strict=True):
        share = 1 - trained.alpha(t)
        torch.testing.assert_close(share, torch.full_like(share, n / 12), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trained", [Schedule("linear"), Schedule("cosine")], ids=lambda s: f"trained {s.name}")
@pytest.mark.parametrize(("pace", "steps"), [("linear", 6), ("cosine", 6), ("linear", None)])
def test_ancestral_tells_the_level_at_which_so_many_are_masked(pace: Any, trained: Schedule, steps: int | None) -> None:
    denoiser, canvas = Flat(), torch.full((150, 50), MASK)
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


def test_a_halton_order_spreads_out() -> None:
    """Ranks are a permutation; a quarter of them has a quarter of its cells in each quadrant, give or take one."""
    for h, w in ((8, 8), (6, 10), (16, 32), (1, 5), (1, 1)):
        rank = halton_order(h, w)
        assert rank.sort().values.tolist() == list(range(h * w))
    for h, w in ((8, 8), (32, 32)):
        early = (halton_order(h, w) < h * w // 4).view(2, h // 2, 2, w // 2).sum((1, 3))
        assert int((early - h * w // 16).abs().max()) <= 2
    # points (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9)
    assert halton_order(2, 2).tolist() == [2, 1, 0, 3]


def test_halton_reveals_in_order_and_what_has_no_rank_last() -> None:
    denoiser, order = Flat(), torch.tensor([3, -1, 0, 1, -1, 2, 4, -1]).expand(30, -1)
    run(Plan("halton", steps=4), denoiser, 30, 8, order=order)
    left = [denoiser.masked[k] for k in range(4)]
    assert left[1] == [[0, 1, 4, 5, 6, 7]] * 30 and left[2] == [[1, 4, 6, 7]] * 30
    assert all(len(row) == 2 and set(row) < {1, 4, 7} for row in left[3])
    assert len({tuple(row) for row in left[3]}) == 3  # those are drawn
    for k, (_, t) in enumerate(denoiser.seen):
        torch.testing.assert_close(t, torch.full_like(t, 1 - k / 4))


def test_ancestral_rows_have_their_own_passes() -> None:
    """A row's passes are those in which it reveals something; with 40 steps and 6 positions most would be idle."""
    denoiser, canvas = Flat(), torch.full((50, 50), MASK)
    generate = torch.arange(50) < torch.tensor([6] * 49 + [50]).unsqueeze(1)
    sample(denoiser, canvas, generate, Plan("ancestral", steps=40), mask_id=MASK, generator=seeded())
    left = torch.stack([((ids == MASK) & generate).sum(1) for ids, _ in denoiser.seen])
    assert bool((left.diff(dim=0) < 0)[left[:-1] > 0].all())
    assert int((left[:, :49] > 0).sum(0).max()) <= 6
    passes = int((left[:, 49] > 0).sum())
    assert passes == len(denoiser.seen) < 36  # 40 (1 - (1 - 1/40)^50) is 28.7


@pytest.mark.parametrize("name", ["ancestral", "halton", "confidence", "entropy", "threshold"])
@pytest.mark.parametrize("steps", [None, 2, 3, 4, 7])
def test_blocks_come_from_left_to_right(name: Any, steps: int | None) -> None:
    """10 positions in blocks of 4; with 2 steps in blocks of 5."""
    denoiser = Flat()
    run(Plan(name, steps=steps, block=4), denoiser, 20, 10, order=torch.arange(10).flip(0).expand(20, -1))
    assert len(denoiser.seen) <= (steps or 10)
    size = 5 if steps == 2 else 4
    for masked, after in zip(denoiser.masked, denoiser.masked[1:], strict=False):
        for before, later in zip(masked, after, strict=True):
            revealed = {i // size for i in before if i not in later}
            assert revealed == ({before[0] // size} if before else set())


def test_blocks_share_the_steps() -> None:
    """44 positions, 6 blocks, 16 passes: they start at 0, 2, 5, 8, 10, 13; rows of other lengths have their own."""
    denoiser, canvas = Flat(), torch.full((2, 44), MASK)
    generate = torch.arange(44) < torch.tensor([[44], [6]])
    plan = Plan("confidence", steps=16, block=8)
    sample(denoiser, canvas, generate, plan, mask_id=MASK, generator=seeded())
    left = torch.stack([((ids == MASK) & generate).sum(1) for ids, _ in denoiser.seen])
    assert left[:, 0].tolist() == [44, 40, 36, 33, 30, 28, 25, 22, 20, 16, 12, 9, 6, 4, 2, 1]
    assert left[:, 1].tolist() == [6, 5, 4, 3, 2, 1] + [0] * 10


def test_entropy_reveals_the_largest_nearly_independent_set() -> None:
    """Entropies .056, .199, .325, .500, .673 (and ln 2): sum less the largest is 0, .056, .255, .580."""
    logits = sure(0.6, 0.99, 0.8, 0.9, 0.95, 0.5)
    for gamma, left in (
        (0.0, [[0, 1, 2, 3, 4, 5], [0, 2, 3, 4, 5], [0, 2, 3, 5], [0, 2, 5], [0, 5], [5]]),
        (0.26, [[0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 5], [5]]),
        (0.6, [[0, 1, 2, 3, 4, 5], [0, 5], [5]]),
        (9.0, [[0, 1, 2, 3, 4, 5]]),
    ):
        denoiser = Flat(logits)
        run(Plan("entropy", steps=None, gamma=gamma), denoiser, 3, 6)
        assert denoiser.masked == [[row] * 3 for row in left]
        for masked, (_, t) in zip(left, denoiser.seen, strict=True):
            torch.testing.assert_close(t, torch.full_like(t, len(masked) / 6))


def test_threshold_reveals_all_that_is_certain_and_at_least_one() -> None:
    denoiser = Flat(sure(0.6, 0.99, 0.8, 0.9, 0.95, 0.55))
    run(Plan("threshold", steps=None, tau=0.85), denoiser, 2, 6)
    assert denoiser.masked == [[row] * 2 for row in ([0, 1, 2, 3, 4, 5], [0, 2, 5], [0, 5], [5])]


@pytest.mark.parametrize("name", ["entropy", "threshold"])
def test_steps_bound_what_the_distributions_ask_for(name: Any) -> None:
    """Never certain: 12 positions in 5 passes are 3, 3, 2, 2, 2. Certain of half of it: then 6 in 4 are 2, 2, 1, 1."""
    plan = Plan(name, steps=5, gamma=0.0, tau=0.9)
    denoiser = Flat(sure(*[0.6] * 12))
    run(plan, denoiser, 2, 12)
    assert [len(rows[0]) for rows in denoiser.masked] == [12, 9, 6, 4, 2]
    denoiser = Flat(sure(*[1.0] * 6, *[0.6] * 6))
    run(plan, denoiser, 2, 12)
    assert [len(rows[0]) for rows in denoiser.masked] == ([12, 5, 3, 2, 1] if name == "entropy" else [12, 6, 4, 2, 1])


def test_a_row_stops_when_its_predictions_are_stable_and_confident() -> None:
    logits = sure(*[0.8] * 8)
    for options, passes in (
        ({"patience": 1}, 2),
        ({"patience": 3}, 4),
        ({"patience": 1, "patience_confidence": 0.85}, 8),
        ({"patience": 20}, 8),
    ):
        denoiser = Flat(logits)
        options = {"patience_confidence": 0.7, **options}
        ids = run(Plan("halton", None, **options), denoiser, 40, 8, order=torch.arange(8).expand(40, -1))
        assert len(denoiser.seen) == passes
        filled = ids[:, passes - 1 :] if passes < 8 else ids[:, :0]
        assert not bool(filled.any())  # by the most probable value
        assert bool(ids[:, : passes - 1].any())  # those before were drawn

    left: list[int] = []

    def changing(ids: Tensor, t: Tensor) -> Tensor:
        """What is most probable changes when 6 are left, and back when 4 are."""
        left.append(int((ids == MASK)[0].sum()))
        now = logits[:, [1, 0, 2, 3, 4]] if left[-1] in (6, 5) else logits
        return now.expand(len(ids), -1, -1)

    for patience, passes in ((1, 2), (2, 7), (3, 8)):
        left.clear()
        run(Plan("ancestral", None, patience=patience, patience_confidence=0.7), changing, 1, 8)
        assert left == list(range(8, 8 - passes, -1))


REMASKING = {
    "cap": ({"remask": "cap", "remask_eta": 0.2}, lambda tau: 1 - tau),
    "cap, cosine": ({"remask": "cap", "remask_eta": 0.2, "schedule": "cosine"}, None),
    "rescale": ({"remask": "rescale", "remask_eta": 0.3}, lambda tau: 1 - tau),
    "largest": ({"remask": "rescale", "remask_eta": 1.0}, lambda tau: 1 - tau),
    "switch": ({"remask": "cap", "remask_eta": 0.2, "remask_from": 0.5}, lambda tau: 1 - tau),
    "loop": (
        {"remask": "cap", "remask_eta": 0.2, "remask_from": 0.75, "remask_to": 0.25, "remask_hold": 0.6},
        lambda tau: 0.6 * (1 - tau) / 0.25 if tau > 0.75 else 0.6 if tau >= 0.25 else 0.6 + 0.4 * (0.25 - tau) / 0.25,
    ),
}


@pytest.mark.parametrize("name", REMASKING)
def test_remasking_keeps_the_marginals_of_its_schedule(name: str) -> None:
    """Whatever sigma: the share that is clean after each pass is alpha, and it is what the denoiser is told."""
    options, clean = REMASKING[name]
    if clean is None:
        cosine = Schedule("cosine")

        def clean(tau: float) -> float:
            return float(cosine.alpha(torch.tensor(tau)))

    denoiser = Flat()
    plan = Plan("ancestral", steps=16, **options)
    ids = run(plan, denoiser, 1000, 60)
    assert not bool((ids == MASK).any()) and len(denoiser.seen) == 16
    again = []
    for k, (state, t) in enumerate(denoiser.seen):
        alpha = clean(1 - k / 16)
        assert float((state != MASK).float().mean()) == pytest.approx(alpha, abs=0.01)  # sd at most 0.002
        torch.testing.assert_close(t, torch.full_like(t, 1 - alpha), atol=1e-5, rtol=0)
        if k:
            before = denoiser.seen[k - 1][0] != MASK
            again.append(float((before & (state == MASK)).sum() / before.sum().clamp(min=1)))
    # again[k] is of pass k: pass 7 goes from tau = 9/16 to 8/16, pass 9 from 7/16 to 6/16
    largest = (1 - clean(6 / 16)) / clean(7 / 16)
    sigma = {"cap": min(plan.remask_eta, largest), "rescale": plan.remask_eta * min(1.0, largest)}[plan.remask]
    assert again[9] == pytest.approx(sigma, abs=0.02)
    assert (again[7] == 0) == (name == "switch")
    # values are drawn anew, each from the same distribution
    shown = torch.stack([(ids == v).float().mean(0) for v in range(5)], 1)
    torch.testing.assert_close(shown, torch.softmax(denoiser.logits[:60], 1), atol=0.08, rtol=0)


def test_plans_say_what_they_are() -> None:
    assert Plan("ancestral", None).exact and Plan("entropy", None, gamma=0.0).exact and not Plan().exact
    for options in ({"guidance": 1.0}, {"temperature": 0.9}, {"temperature_end": 0.5}, {"top_k": 3}, {"top_p": 0.9}):
        assert not Plan("ancestral", None, **options).exact
    assert not Plan("ancestral", None, patience=2).exact and not Plan("confidence", None).exact
    assert [Plan(steps=16).capped(n) for n in (0, 5, 16, 99)] == [0, 5, 16, 16]
    assert [Plan(steps=None).capped(n) for n in (0, 99)] == [0, 99]
    assert [Plan(steps=16, remask="cap").capped(n) for n in (0, 5, 99)] == [0, 16, 16]
    t = torch.tensor([1.0, 0.5, 0.2])
    assert Plan(guidance=5.0, guidance_schedule="linear").scale(t).tolist() == pytest.approx([0, 2.5, 4])
    assert Plan(guidance=5.0, guidance_from=0.5).scale(t).tolist() == [0, 5, 5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "at least one"),
        ({"top_k": 0}, "at least one"),
        ({"block": 0}, "at least one"),
        ({"temperature": -1.0}, "not be negative"),
        ({"choice_temperature": -0.1}, "not be negative"),
        ({"temperature_end": 1.5}, "temperature_end"),
        ({"top_p": 0.0}, "top_p"),
        ({"tau": 1.5}, "between 0 and 1"),
        ({"remask_from": 0.2, "remask_to": 0.4}, "remask_from"),
        ({"remask_hold": 0.5}, "needs `remask`"),
        ({"remask": "cap", "name": "confidence"}, "remask goes with ancestral"),
        ({"remask": "cap", "steps": None}, "remask goes with ancestral"),
        ({"remask": "cap", "block": 4}, "remask goes with ancestral"),
    ],
)
def test_impossible_plans(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(**options)
    for wrong in ({"name": "x"}, {"remask": "x"}, {"guidance_schedule": "x"}):
        with pytest.raises((ValueError, TypeError)):  # under pytest the check of types comes first
            Plan(**wrong)  # type: ignore[arg-type]
