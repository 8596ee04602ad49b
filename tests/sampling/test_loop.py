"""The loop: what every plan keeps to, alone and beside others; cost; no pause for the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from medim.diffusion import Group
from medim.sampling import Cost, Plan, sample

Entry = Plan | tuple[Plan, Plan]
PLANS: dict[str, Entry] = {
    "ancestral": Plan("ancestral", steps=None),
    "ancestral, 5 steps": Plan("ancestral", steps=5),
    "ancestral, cosine": Plan("ancestral", steps=4, schedule="cosine"),
    "ancestral, block": Plan("ancestral", steps=6, block=4),
    "ancestral, block, all": Plan("ancestral", steps=None, block=4),
    "ancestral, filtered": Plan("ancestral", steps=5, temperature_end=0.2, top_k=4, top_p=0.9),
    "ancestral, patience": Plan("ancestral", steps=None, patience=1, patience_confidence=0.2),
    "confidence": Plan("confidence", steps=5, schedule="cosine"),
    "confidence, all": Plan("confidence", steps=None),
    "confidence, block": Plan("confidence", steps=7, block=3),
    "halton": Plan("halton", steps=5, schedule="cosine"),
    "halton, block, all": Plan("halton", steps=None, block=5),
    "entropy": Plan("entropy", steps=None, gamma=2.0),
    "entropy, block, 6 steps": Plan("entropy", steps=6, gamma=0.5, block=4),
    "threshold": Plan("threshold", steps=None, tau=0.4),
    "threshold, 4 steps": Plan("threshold", steps=4, tau=0.9),
    "ReMDM-cap": Plan("ancestral", steps=9, remask="cap", remask_eta=0.3),
    "ReMDM-loop": Plan("ancestral", steps=9, remask="rescale", remask_eta=0.5, remask_from=0.7, remask_hold=0.6),
    "ancestral + confidence": (Plan("ancestral", steps=None), Plan("confidence", steps=3)),
    "entropy + halton": (Plan("entropy", steps=None, gamma=1.0), Plan("halton", steps=4)),
    "threshold + ReMDM": (Plan("threshold", steps=6, tau=0.5), Plan("ancestral", steps=8, remask="cap")),
}
all_plans = pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def each(plan: Entry) -> tuple[Plan, ...]:
    return (plan,) if isinstance(plan, Plan) else plan


def but(plan: Entry, **options: Any) -> Entry:
    """The same plan or plans with other options."""
    changed = tuple(replace(one, **options) for one in each(plan))
    return changed if isinstance(plan, tuple) else changed[0]


def run(
    plan: Entry, denoiser: Any, canvas: Tensor, generate: Tensor | None = None, generator: Any = None, **options: Any
) -> Tensor:
    """Sample; of two plans the first has every third position. Two thirds of the positions have a rank."""
    generate = canvas == MASK if generate is None else generate
    place = torch.arange(canvas.shape[1], device=canvas.device).expand(canvas.shape)
    first = generate & (place % 3 == 0)
    plans = plan if isinstance(plan, Plan) else [(plan[0], first), (plan[1], generate & ~first)]
    order = torch.where(place % 3 == 1, -1, place * 7 % 64)
    generator = seeded() if generator is None else generator
    return sample(denoiser, canvas, generate, plans, mask_id=MASK, generator=generator, order=order, **options)


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
def test_ends_without_masks_in_at_most_its_steps_and_keeps_what_is_given(plan: Entry) -> None:
    denoiser, canvas, cost = Hashing(), padded(canvases(), 30), Cost(2, 0, [1, 0, 0, 0])
    told: list[tuple[int, int]] = []
    generate = canvas == MASK
    out = run(plan, denoiser, canvas, cost=cost, progress=lambda done, total: told.append((done, total)))
    assert bool((out[generate] < 5).all()) and torch.equal(out[~generate], canvas[~generate])
    passes, most = len(denoiser.seen), max(one.capped(20) for one in each(plan))
    assert passes <= most <= 20
    assert (cost.forward_passes, cost.active_tokens) == (passes + 2, passes * canvas.numel())
    assert [done for done, _ in told] == list(range(1, passes + 1)) and passes <= told[0][1] <= most
    left = torch.stack([(ids == MASK).sum(1) for ids, _ in denoiser.seen])
    remasks = any(one.remask for one in each(plan))
    if not remasks:  # no pass is idle, and a row has its passes one after the other
        assert bool((left.diff(dim=0) <= 0).all())
        assert isinstance(plan, tuple) or bool((left.diff(dim=0) < 0)[left[:-1] > 0].all())
        assert [a - b for a, b in zip(cost.row_passes, [1, 0, 0, 0], strict=True)] == (left > 0).sum(0).tolist()
    for ids, t in denoiser.seen:
        assert torch.equal(ids[~generate], canvas[~generate]) and not bool(t[~generate].any())
        assert bool(((t >= 0) & (t <= 1.00001)).all())
        assert remasks or bool((t[ids == MASK] > 0).all())


@all_plans
def test_both_branches_count(plan: Entry) -> None:
    canvas, cost = padded(canvases(), 30), Cost()
    condition = torch.zeros_like(canvas, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    denoiser = Hashing()
    run(but(plan, guidance=1.0), denoiser, canvas, condition=condition, cost=cost)
    assert cost.active_tokens == 2 * cost.forward_passes * canvas.numel() == sum(i.numel() for i, _ in denoiser.seen)
    late = Cost()
    run(but(plan, guidance=1.0, guidance_from=0.5), denoiser, canvas, condition=condition, cost=late)
    if all(one.name in ("halton", "confidence") or one.remask for one in each(plan)):  # all rows begin at t=1
        assert late.active_tokens < 2 * late.forward_passes * canvas.numel()
    if any(one.name in ("entropy", "threshold") for one in each(plan)):
        assert late.active_tokens == 2 * late.forward_passes * canvas.numel()


@all_plans
def test_guidance_of_zero_is_none(toy: Callable[..., Any], plan: Entry) -> None:
    canvas, it = torch.tensor([2, 5, 5, 5]).expand(200, -1), toy(length=4, values=5, mask_id=MASK)
    condition = torch.tensor([True, False, False, False]).expand(200, -1)
    plain = run(plan, it, canvas)
    assert torch.equal(plain, run(plan, it, canvas, condition=condition))
    assert torch.equal(plain, run(but(plan, guidance=1e-9), it, canvas, condition=condition))


@all_plans
def test_a_plan_is_plain_data(plan: Entry) -> None:
    import json

    for one in each(plan):
        assert Plan(**json.loads(json.dumps(asdict(one)))) == one


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
@pytest.mark.parametrize(
    "options",
    [{}, {"guidance": 1.5, "temperature": 3.0}, {"guidance": 2.0, "guidance_schedule": "linear", "guidance_from": 0.6}],
    ids=["plain", "guided", "guided late"],
)
def test_a_row_depends_neither_on_its_neighbours_nor_on_padding(plan: Entry, options: dict[str, Any]) -> None:
    """Two calls one after the other on the same generators, as a pair is made of a report and an image."""

    def rows_of(rows: list[Tensor], numbers: list[int], length: int) -> tuple[list[Tensor], list[int]]:
        canvas, generators, cost = padded(rows, length), [seeded(100 + i) for i in numbers], Cost()
        even = (torch.arange(length) % 2 == 0).expand(canvas.shape)
        condition = torch.zeros_like(even).index_fill(1, torch.tensor([0]), True)
        todo = canvas == MASK
        for part in (todo & even, todo & ~even):
            guided = but(plan, **options)
            canvas = run(guided, Hashing(), canvas, part, generators, condition=condition, cost=cost)
        return [row[: len(start)] for row, start in zip(canvas, rows, strict=True)], cost.row_passes

    rows = canvases()
    together, passes = rows_of(rows, [0, 1, 2, 3], 24)
    for i, row in enumerate(rows):
        for beside, numbers, length in (([], [i], len(row)), ([rows[2]], [i, 9], 40)):
            alone, own_passes = rows_of([row, *beside], numbers, length)
            assert torch.equal(alone[0], together[i]) and own_passes[0] == passes[i]
    assert not torch.equal(rows_of([rows[1]], [5], 24)[0][0], together[1])  # and it does depend on its seed


@all_plans
def test_the_same_seed_gives_the_same_rows(plan: Entry) -> None:
    canvas = padded(canvases(), 24)
    one, again, other = (run(plan, Hashing(), canvas, generator=seeded(seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_a_call_takes_one_number_from_a_rows_generator_whatever_it_does() -> None:
    canvas = torch.tensor([[1, MASK, MASK, 2]])
    left = []
    for places, plan in (([], Plan()), ([1], Plan()), ([1, 2], Plan("confidence", None)), ([2], Plan(remask="cap"))):
        generator, generate = seeded(), torch.zeros(1, 4, dtype=torch.bool)
        generate[:, places] = True
        sample(Hashing(), canvas, generate, plan, mask_id=MASK, generator=[generator])
        left.append(torch.rand((), generator=generator).item())
    assert len(set(left)) == 1


def test_plans_on_one_canvas_draw_independent_values() -> None:
    """Two positions, the same logits, both revealed at once: alike with probability sum p^2."""
    logits = torch.tensor([0.0, 0.4, 0.8, -0.3, 0.1])
    canvas = torch.full((20_000, 2), MASK)
    left = (torch.arange(2) == 0).expand(canvas.shape)
    plans = [(Plan(steps=1), left), (Plan("confidence", steps=1), ~left)]
    ids = sample(
        lambda ids, t: logits.expand(*ids.shape, -1), canvas, canvas == MASK, plans, mask_id=MASK, generator=seeded()
    )
    wanted = float((torch.softmax(logits, 0) ** 2).sum())
    assert float((ids[:, 0] == ids[:, 1]).float().mean()) == pytest.approx(wanted, abs=0.015)


def test_plans_on_one_canvas_walk_together_each_at_its_own_pace() -> None:
    canvas, cost = torch.full((2, 12), MASK), Cost()
    denoiser, text = Hashing(), (torch.arange(12) < 8).expand(2, -1)
    plans = [(Plan("halton", 4), text), (Plan("confidence", 2), ~text)]
    order = torch.arange(12).expand(2, -1)
    sample(denoiser, canvas, canvas == MASK, plans, mask_id=MASK, generator=seeded(), order=order, cost=cost)
    assert [((ids == MASK) & text).sum(1).tolist() for ids, _ in denoiser.seen] == [[8] * 2, [6] * 2, [4] * 2, [2] * 2]
    assert [((ids == MASK) & ~text).sum(1).tolist() for ids, _ in denoiser.seen] == [[4] * 2, [2] * 2, [0] * 2, [0] * 2]
    told = [(t[0, 0].item(), t[0, -1].item()) for _, t in denoiser.seen]
    assert told == [(1, 1), (0.75, 0.5), (0.5, 0), (0.25, 0)]
    assert (cost.forward_passes, cost.row_passes) == (4, [4, 4])


class Asking(TorchDispatchMode):
    """Lists the operations that make the host wait for a device, once the denoiser was called."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_unique2", "unique_dim", "item")

    def __init__(self, denoiser: Any) -> None:
        super().__init__()
        self.denoiser, self.asked, self.calls = denoiser, [], 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        boolean_index = name in ("index", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if self.denoiser.seen and (name in self.WAITS or boolean_index):
            self.asked.append(name)
            self.calls = len(self.denoiser.seen)
        return func(*args, **(kwargs or {}))


@all_plans
@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_after_the_first_pass_only_the_poll_asks_the_device(plan: Entry, scale: float) -> None:
    canvas = padded(canvases(), 30)
    condition = torch.zeros_like(canvas, dtype=torch.bool).index_fill(1, torch.tensor([0]), True)
    denoiser = Hashing()
    with Asking(denoiser) as mode:
        run(but(plan, guidance=scale), denoiser, canvas, condition=condition)
    polled = not all(one.fixed for one in each(plan))
    most = len(denoiser.seen) if polled else 0
    assert mode.asked == ["_local_scalar_dense"] * len(mode.asked) and len(mode.asked) <= most
    assert bool(mode.asked) == (polled and not any(one.remask for one in each(plan)))  # which knows when it ends
    with Asking(denoiser) as mode:  # that it would notice
        bool(canvas.any()), canvas[canvas == MASK]
    assert mode.asked == ["_local_scalar_dense", "index"]


class OnDevice:
    """Logits that were made on the device beforehand; the columns of [MASK] and padding do not exist."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.logits = torch.randn(2 * shape[0], shape[1], 5, device="cuda")
        self.passes = 0

    def groups(self, generate: Tensor) -> list[Group]:
        return [Group(generate.flatten().nonzero().squeeze(1), 0, 5)]

    def restricted(self, ids: Tensor, t: Tensor, groups: list[Group]) -> list[Tensor]:
        self.passes += 1
        if self.passes == 1:
            torch.cuda.set_sync_debug_mode("error")  # from the first pass on
        return [self.logits.flatten(0, 1)[group.rows] for group in groups]

    def __call__(self, ids: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@all_plans
def test_no_pass_waits_for_the_device(plan: Entry) -> None:
    canvas = padded(canvases(), 30).cuda()
    denoiser = OnDevice((4, 30))
    condition = torch.zeros_like(canvas, dtype=torch.bool)
    condition[:, 0] = True
    told: list[int] = []
    try:
        ids = run(
            but(plan, guidance=1.0), denoiser, canvas, condition=condition, progress=lambda done, _: told.append(done)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert denoiser.passes == len(told) and not bool((ids == MASK).any())


def test_mistakes() -> None:
    canvas = torch.full((2, 3), MASK)
    generate = canvas == MASK
    with pytest.raises(ValueError, match="guidance needs"):
        sample(Hashing(), canvas, generate, Plan(guidance=1.0), mask_id=MASK, generator=seeded())
    with pytest.raises(ValueError, match="halton needs `order`"):
        sample(Hashing(), canvas, generate, Plan("halton"), mask_id=MASK, generator=seeded())
    with pytest.raises(ValueError, match="3 generators for 2 rows"):
        sample(Hashing(), canvas, generate, Plan(), mask_id=MASK, generator=[seeded()] * 3)
    for plans in ([(Plan(), generate), (Plan(), generate)], [(Plan(), generate & False)]):
        with pytest.raises(ValueError, match="must cover `generate`"):
            sample(Hashing(), canvas, generate, plans, mask_id=MASK, generator=seeded())
