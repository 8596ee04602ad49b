"""The objective: noise as a function of the place, tasks as noise levels, sums that any split leaves as they are."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from medim.canvas import ROLES, Canvas
from medim.diffusion import Schedule, nelbo_tokens
from medim.model.medim import MeDiMModel
from medim.objective import T_BINS, Batch, ObjectiveOptions, count, loss, make_batch, noise_levels
from medim.vocabulary import KINDS, Vocabulary

BOTH = np.array([ROLES.index("image"), ROLES.index("report")])
LENGTHS = [8, 3, 5, 9, 1, 4, 7, 6]


def only(**tasks: float) -> ObjectiveOptions:
    return ObjectiveOptions(tasks=tasks, condition_dropout=0.0)  # type: ignore[arg-type]


@pytest.fixture
def batch_of(make_rows: Any, vocabulary: Vocabulary) -> Any:
    """Makes the batch of some of eight rows at a step."""
    rows = make_rows(LENGTHS)

    def make(places: list[int], o: ObjectiveOptions, step: int = 3, seed: int = 5) -> Batch:
        canvas = Canvas.collate([rows[p] for p in places], 0)
        return make_batch(canvas, places, len(rows), step, seed, o, vocabulary.mask)

    return make


def test_noise_is_a_function_of_the_place_alone(batch_of: Any) -> None:
    o = ObjectiveOptions()
    whole = batch_of(list(range(8)), o)
    for places in ([0, 1, 2, 3], [4, 5, 6, 7], [2], [6, 1]):
        part = batch_of(places, o)
        assert torch.equal(part.t, whole.t[places])
        length = part.canvas.ids.shape[1]
        valid = part.canvas.valid
        assert torch.equal(part.canvas.ids[valid], whole.canvas.ids[places, :length][valid])
    assert torch.equal(batch_of(list(range(8)), o).canvas.ids, whole.canvas.ids)
    assert not torch.equal(batch_of(list(range(8)), o, step=4).t, whole.t)
    assert not torch.equal(batch_of(list(range(8)), o, seed=6).t, whole.t)


def test_noise_levels_are_stratified_over_the_global_batch() -> None:
    size, o = 64, ObjectiveOptions(tasks={"pair": 1.0}, min_t=0.01)
    for step in range(5):
        parts = [noise_levels(np.tile(BOTH, (16, 1)), range(k, k + 16), size, step, 0, o)[0] for k in range(0, 64, 16)]
        t = np.concatenate(parts)
        assert t.min() >= 0.01 and t.max() <= 1
        strata = np.floor((t - 0.01) / 0.99 * size).astype(int)
        for segment in range(2):
            assert sorted(strata[:, segment].clip(max=size - 1)) == list(range(size))
        assert abs(np.corrcoef(t.T)[0, 1]) < 0.5  # each segment has its own


def test_tasks_come_as_often_as_they_weigh() -> None:
    o = ObjectiveOptions(tasks={"pair": 3.0, "report": 2.0, "image": 1.0}, condition_dropout=0.25)
    n = 6000
    t, supervised = noise_levels(np.tile(BOTH, (n, 1)), range(n), n, 0, 0, o)
    share = {"pair": supervised.all(1), "report": supervised[:, 1] & ~supervised[:, 0]}
    share["image"] = supervised[:, 0] & ~supervised[:, 1]
    for name, weight in o.tasks.items():
        p = weight / 6
        assert abs(share[name].mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    given = ~supervised
    assert set(np.unique(t[given])) == {0.0, 1.0}
    k = given.sum()
    assert abs((t[given] == 1).mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / k)


def test_a_row_without_anything_else_to_learn_has_no_condition() -> None:
    roles = np.array([[ROLES.index("image"), -1], [ROLES.index("image"), ROLES.index("report")]])
    t, supervised = noise_levels(roles, [0, 1], 2, 0, 0, only(report=1.0))
    assert supervised.tolist() == [[True, False], [False, True]]
    assert t[0, 0] > 0 and t[1, 0] == 0


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_given_segments_are_clean_or_masked_and_never_supervised(
    batch_of: Any, vocabulary: Vocabulary, make_rows: Any, dropout: float
) -> None:
    clean = Canvas.collate(make_rows(LENGTHS), 0)
    o = ObjectiveOptions(tasks={"report": 1.0}, condition_dropout=dropout)
    batch = batch_of(list(range(8)), o)
    image = clean.has_role("image")
    masked = batch.canvas.ids == vocabulary.mask
    assert bool((masked[image] == bool(dropout)).all())
    assert not bool(masked[clean.segment < 0].any())  # tags and padding are never noised
    assert torch.equal(batch.canvas.ids[~masked], clean.ids[~masked])
    text, codes = batch.rows
    assert len(codes) == 0 and torch.equal(text, (masked & ~image).flatten().nonzero().squeeze(1))
    assert torch.equal(batch.targets[0], clean.ids.flatten()[text])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_share_of_masked_positions_is_that_of_the_schedule(
    make_rows: Any, vocabulary: Vocabulary, schedule: Any
) -> None:
    o = ObjectiveOptions(tasks={"pair": 1.0}, schedule=schedule)
    canvas = Canvas.collate(make_rows([40] * 200), 0)
    batch = make_batch(canvas, range(200), 200, 0, 0, o, vocabulary.mask)
    rate = (1 - Schedule(schedule).alpha(batch.t)).gather(1, canvas.segment.clamp(min=0))
    text = canvas.has_role("report")
    off = ((batch.canvas.ids == vocabulary.mask).float() - rate)[text]
    assert abs(float(off.mean())) < 4 * math.sqrt(0.25 / off.numel())
    assert float(torch.corrcoef(torch.stack([off + rate[text], rate[text]]))[0, 1]) > 0.4


@pytest.mark.parametrize("weighting", ["flat", "mdlm"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_loss_is_the_plain_one_of_all_logits(
    tiny_network: MeDiMModel, batch_of: Any, schedule: Any, weighting: Any
) -> None:
    o = ObjectiveOptions(schedule=schedule, weighting=weighting, modality_weights={"text": 2.0, "image": 0.5})
    batch = batch_of(list(range(8)), o)
    found = loss(tiny_network, batch, o)

    canvas, vocabulary = batch.canvas, tiny_network.vocabulary
    t = torch.where(canvas.segment < 0, 0.0, batch.t.gather(1, canvas.segment.clamp(min=0)))
    each = torch.arange(t.shape[1]).expand(t.shape)
    logits = tiny_network(canvas.ids, t, each, canvas.valid) @ tiny_network.output_weight.T
    total, weighed = torch.zeros(()), 0.0
    nats, positions = torch.zeros(2, T_BINS), torch.zeros(2, T_BINS)
    for number, kind in enumerate(KINDS):
        start, stop = vocabulary.columns(kind)
        for row, target in zip(batch.rows[number].tolist(), batch.targets[number].tolist(), strict=True):
            b, i = divmod(row, t.shape[1])
            assert canvas.ids[b, i] == vocabulary.mask
            nll = -logits[b, i, start:stop].log_softmax(0)[target - start]
            scale = float(Schedule(schedule).weight(t[b, i])) if weighting == "mdlm" else 1.0
            total = total + {"text": 2.0, "image": 0.5}[kind] * scale * nll
            weighed += {"text": 2.0, "image": 0.5}[kind]
            nats[number, min(int(t[b, i] * T_BINS), T_BINS - 1)] += nll.detach()
            positions[number, min(int(t[b, i] * T_BINS), T_BINS - 1)] += 1
    torch.testing.assert_close(found.total, total, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(found.nats, nats, rtol=1e-5, atol=1e-4)
    assert torch.equal(found.positions, positions)
    assert count(batch, o) == weighed and float(found.positions.sum()) == sum(len(rows) for rows in batch.rows)


def test_parts_of_a_batch_sum_to_the_whole(tiny_network: MeDiMModel, batch_of: Any) -> None:
    o = ObjectiveOptions(weighting="mdlm")

    def run(splits: list[list[int]]) -> tuple[float, float, list[torch.Tensor], dict[str, torch.Tensor]]:
        tiny_network.zero_grad()
        losses, counts = [], 0.0
        for places in splits:
            batch = batch_of(places, o)
            losses.append(loss(tiny_network, batch, o))
            losses[-1].total.backward()
            counts += count(batch, o)
        sums = [sum((getattr(one, name) for one in losses), torch.zeros(())) for name in ("nats", "positions")]
        gradients = {n: p.grad.clone() for n, p in tiny_network.named_parameters() if p.grad is not None}
        return sum(one.total.item() for one in losses), counts, sums, gradients

    whole = run([list(range(8))])
    for splits in ([[0, 1, 2, 3], [4, 5, 6, 7]], [[i] for i in range(8)]):
        parts = run(splits)
        assert parts[0] == pytest.approx(whole[0], rel=1e-5) and parts[1] == whole[1]
        for one, other in zip(parts[2], whole[2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert parts[3].keys() == whole[3].keys()
        for name, value in whole[3].items():
            torch.testing.assert_close(parts[3][name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


@pytest.mark.parametrize("condition", ["full", "prefix"])
def test_packed_rows_have_the_losses_and_gradients_of_padded_ones(
    tiny_network: MeDiMModel, make_rows: Any, vocabulary: Vocabulary, condition: Any
) -> None:
    rows, o = make_rows(LENGTHS), ObjectiveOptions(condition_attention=condition, condition_dropout=0.3)
    found = []
    for canvas in (Canvas.collate(rows, 0), Canvas.pack(rows, 0, 50)):
        tiny_network.zero_grad()
        batch = make_batch(canvas, range(8), 8, 3, 5, o, vocabulary.mask)
        one = loss(tiny_network, batch, o)
        one.total.backward()
        found.append((one, count(batch, o), {n: p.grad.clone() for n, p in tiny_network.named_parameters()}, batch))
    (padded, weight, slopes, wide), (packed, weight_too, slopes_too, narrow) = found
    assert wide.canvas.ids.shape == (8, 19) and narrow.canvas.ids.shape == (3, 50) and weight == weight_too
    assert torch.equal(padded.positions, packed.positions)
    torch.testing.assert_close(padded.nats, packed.nats, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(padded.total, packed.total, rtol=1e-5, atol=1e-4)
    for name, value in slopes.items():
        torch.testing.assert_close(slopes_too[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()) + 1e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_mdlm_loss_is_the_bound(
    tiny_network: MeDiMModel, make_rows: Any, vocabulary: Vocabulary, schedule: Any
) -> None:
    """Report given image: one segment is generated, so that its own level is the shared level of the bound.

    Both are compared over t in [0.02, 1]: below, a large weight and a rare mask make a tail too long for a quick test.
    """
    o = ObjectiveOptions(tasks={"report": 1.0}, condition_dropout=0.0, weighting="mdlm", schedule=schedule, min_t=0.02)
    canvas = Canvas.collate(make_rows([5]) * 64, 0)
    batches = (make_batch(canvas, range(64), 64, step, 0, o, vocabulary.mask) for step in range(16))
    with torch.no_grad():
        losses = torch.stack([loss(tiny_network, batch, o).total / 64 for batch in batches])
    report, generator = canvas.has_role("report"), torch.Generator().manual_seed(0)
    strata = nelbo_tokens(
        tiny_network.denoiser(canvas, report), canvas.ids, report, mask_id=vocabulary.mask, n_times=50,
        generator=generator, schedule=Schedule(schedule),
    )  # fmt: skip
    bound = strata[1:].mean(0).sum(1)
    error = math.hypot(float(losses.std()) / math.sqrt(len(losses)), float(bound.std()) / math.sqrt(len(bound)))
    assert abs(float(losses.mean() - bound.mean())) < 4 * error
    assert error < 0.05 * float(bound.mean())
