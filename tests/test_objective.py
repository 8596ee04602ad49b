"""The objective: noise as a function of the place, tasks as noise levels, sums that any split leaves as they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from medim.alignment import barlow_twins, info_nce
from medim.canvas import ROLES, Canvas, Segment, layout
from medim.data.order import share
from medim.diffusion import Schedule, nelbo_tokens
from medim.model.backbone import BackboneOptions
from medim.model.medim import MeDiMModel, ModelOptions
from medim.objective import T_BINS, Alone, Batch, ObjectiveOptions, count, loss, make_batch, noise_levels
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


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("world", [1, 2, 4])
def test_noise_levels_are_stratified_over_the_global_batch(world: int, parts: int) -> None:
    """The places are those that the ranks take, each in `parts` of its own for gradient accumulation."""
    size, o = 64, ObjectiveOptions(tasks={"pair": 1.0}, min_t=0.01)
    for step in range(5):
        pieces, one_process_alone = [], []
        for rank in range(world):
            mine = np.arange(size)[share(size, rank, world)]
            for places in np.array_split(mine, parts):
                pieces.append(noise_levels(np.tile(BOTH, (len(places), 1)), places.tolist(), size, step, 0, o)[0])
            one_process_alone.append(np.concatenate(pieces[-parts:]))
        t = np.concatenate(pieces)
        assert t.min() >= 0.01 and t.max() <= 1
        where = (t.astype(np.float64) - 0.01) / 0.99 * size
        strata = np.floor(where).astype(int).clip(max=size - 1)
        for segment in range(2):
            assert sorted(strata[:, segment]) == list(range(size))
        assert abs(np.corrcoef(t.T)[0, 1]) < 0.5  # each segment has its own
        for mine in one_process_alone if world > 1 else []:  # had each process its own strata, these would be met too
            local = np.floor((mine[:, 0] - 0.01) / 0.99 * len(mine)).astype(int)
            assert sorted(local) != list(range(len(mine)))


def test_modality_weights_scale_the_loss_and_the_count(tiny_network: MeDiMModel, batch_of: Any) -> None:
    batch = batch_of(list(range(8)), ObjectiveOptions())

    def run(text: float, image: float) -> tuple[float, float, torch.Tensor]:
        o = ObjectiveOptions(weighting="mdlm", modality_weights={"text": text, "image": image})
        tiny_network.zero_grad()
        found = loss(tiny_network, batch, o)
        found.total.backward()
        assert tiny_network.output_weight.grad is not None
        return found.total.item(), count(batch, o), tiny_network.output_weight.grad.clone()

    text, image, both = run(1, 0), run(0, 1), run(3, 0.5)
    assert (text[1], image[1]) == tuple(len(rows) for rows in batch.rows)
    for one, other, sum_of in zip(text, image, both, strict=True):
        torch.testing.assert_close(
            torch.as_tensor(sum_of), torch.as_tensor(3 * one + 0.5 * other), rtol=1e-4, atol=1e-4
        )
    start, stop = tiny_network.vocabulary.columns("image")
    tied = tiny_network.get_input_embeddings().weight is tiny_network.output_weight
    assert tied or not bool(text[2][start:stop].any())
    scaled = run(6, 1)  # only the ratio of the weights matters to the mean
    assert scaled[0] / scaled[1] == pytest.approx(both[0] / both[1], rel=1e-5)


def test_the_report_puts_each_nat_in_its_modality_and_tenth(tiny_network: MeDiMModel, batch_of: Any) -> None:
    """One row at a time, so that a bin holds one segment's positions; the last bin includes t=1."""
    for place in range(8):
        batch = batch_of([place], ObjectiveOptions(tasks={"pair": 1.0}))
        found = loss(tiny_network, batch, ObjectiveOptions(modality_weights={"text": 7.0, "image": 0.0}))
        for number, kind in enumerate(KINDS):
            t = float(batch.t[0, 1 if kind == "text" else 0])  # the image comes first in a row
            wanted = torch.zeros(T_BINS)
            wanted[min(int(t * T_BINS), T_BINS - 1)] = len(batch.rows[number])
            assert torch.equal(found.positions[number], wanted)
            assert torch.equal(found.nats[number] > 0, wanted > 0)  # not weighed
    masked = batch_of(list(range(8)), ObjectiveOptions(tasks={"report": 1.0}, condition_dropout=0.0))
    at_one = Batch(masked.canvas, torch.ones_like(masked.t), masked.rows, masked.targets)
    bins = loss(tiny_network, at_one, ObjectiveOptions()).positions.sum(0)
    assert float(bins[-1]) == float(bins.sum()) > 0


def test_a_clamp_must_be_positive() -> None:
    with pytest.raises(ValueError, match="snr_clamp"):
        ObjectiveOptions(weighting="min_snr", snr_clamp=0.0)


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


def test_joint_gives_all_segments_one_level_spread_over_the_batch() -> None:
    o = ObjectiveOptions(tasks={"joint": 1.0}, min_t=0.01)
    t, supervised = noise_levels(np.tile(BOTH, (64, 1)), range(64), 64, 3, 0, o)
    assert supervised.all() and (t[:, 0] == t[:, 1]).all()
    assert sorted(((t[:, 0].astype(np.float64) - 0.01) / 0.99 * 64).astype(int)) == list(range(64))
    mixed = ObjectiveOptions(tasks={"joint": 1.0, "pair": 1.0}, condition_dropout=0.0)
    t, _ = noise_levels(np.tile(BOTH, (4000, 1)), range(4000), 4000, 0, 0, mixed)
    same = t[:, 0] == t[:, 1]
    assert abs(same.mean() - 0.5) < 4 * math.sqrt(0.25 / 4000)
    assert abs(np.corrcoef(t[~same].T)[0, 1]) < 0.1


def test_levels_that_are_not_stratified_are_independent() -> None:
    """Of n uniform numbers, n (1 - 1/n)^n strata stay empty in the mean; of stratified ones, none."""
    n = 2000
    t, _ = noise_levels(np.tile(BOTH, (n, 1)), range(n), n, 0, 0, ObjectiveOptions(tasks={"pair": 1}, stratified=False))
    empty = n - len(set((t[:, 0].astype(np.float64) * n).astype(int)))
    assert abs(empty / n - math.exp(-1)) < 0.05
    part, _ = noise_levels(
        np.tile(BOTH, (2, 1)), [7, 3], n, 0, 0, ObjectiveOptions(tasks={"pair": 1}, stratified=False)
    )
    assert (part == t[[7, 3]]).all()


def test_a_first_sentence_that_is_given_is_clean_and_not_learnt(make_rows: Any, vocabulary: Vocabulary) -> None:
    rows = make_rows(LENGTHS)
    stop = int(rows[0].ids[rows[0].segment == 1][2])  # the third id of the first report ends a sentence
    o = ObjectiveOptions(tasks={"joint": 1.0}, first_sentence=1.0)
    for canvas in (Canvas.collate(rows, 0), Canvas.pack(rows, 0, 64)):
        found = make_batch(canvas, range(8), 8, 0, 0, o, vocabulary.mask, [stop])
        never = make_batch(canvas, range(8), 8, 0, 0, replace(o, first_sentence=0.0), vocabulary.mask, [stop])
        for number, row in enumerate(rows):
            here = (canvas.study == number) & canvas.has_role("report")
            report = row.ids[row.segment == 1].tolist()
            size = report.index(stop) + 1 if stop in report else 0
            assert found.canvas.ids[here].tolist()[:size] == report[:size]
            assert torch.equal(found.canvas.ids[here][size:], never.canvas.ids[here][size:])
            lost = set(never.rows[0].tolist()) - set(found.rows[0].tolist())
            assert not set(here.flatten().nonzero().flatten()[:size].tolist()) & set(found.rows[0].tolist())
            assert lost <= set(canvas.has_role("report").flatten().nonzero().flatten().tolist())
    half = replace(o, first_sentence=0.1)
    drawn = [np.random.default_rng([0, 7, 0, place]).random() < half.first_sentence for place in range(4000)]
    assert abs(np.mean(drawn) - 0.1) < 4 * math.sqrt(0.09 / 4000)


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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
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


@pytest.mark.parametrize("weighting", ["flat", "mdlm", "min_snr"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_the_loss_is_the_plain_one_of_all_logits(
    tiny_network: MeDiMModel, batch_of: Any, schedule: Any, weighting: Any
) -> None:
    o = ObjectiveOptions(
        schedule=schedule, weighting=weighting, snr_clamp=2.5, modality_weights={"text": 2.0, "image": 0.5}
    )
    batch = batch_of(list(range(8)), o)
    found = loss(tiny_network, batch, o)

    canvas, vocabulary = batch.canvas, tiny_network.vocabulary
    t = torch.where(canvas.segment < 0, 0.0, batch.t.gather(1, canvas.segment.clamp(min=0)))
    each = torch.arange(t.shape[1]).expand(t.shape)
    logits = tiny_network(canvas.ids, t, each, canvas.valid) @ tiny_network.output_weight.T
    total, weighed, clamped = torch.zeros(()), 0.0, 0
    nats, positions = torch.zeros(2, T_BINS), torch.zeros(2, T_BINS)
    for number, kind in enumerate(KINDS):
        start, stop = vocabulary.columns(kind)
        for row, target in zip(batch.rows[number].tolist(), batch.targets[number].tolist(), strict=True):
            b, i = divmod(row, t.shape[1])
            assert canvas.ids[b, i] == vocabulary.mask
            nll = -logits[b, i, start:stop].log_softmax(0)[target - start]
            scale = float(Schedule(schedule).weight(t[b, i])) if weighting != "flat" else 1.0
            clamped += weighting == "min_snr" and scale > 2.5
            scale = min(scale, 2.5) if weighting == "min_snr" else scale
            total = total + {"text": 2.0, "image": 0.5}[kind] * scale * nll
            weighed += {"text": 2.0, "image": 0.5}[kind]
            nats[number, min(int(t[b, i] * T_BINS), T_BINS - 1)] += nll.detach()
            positions[number, min(int(t[b, i] * T_BINS), T_BINS - 1)] += 1
    assert (clamped > 0) == (weighting == "min_snr")  # or the clamp would not be seen
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


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
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


def test_translate_makes_one_image_of_those_that_are_there() -> None:
    """All else is t=0, by dropout all of it t=1; each image gets its turn; one image alone is drawn from its report."""
    roles = np.tile([ROLES.index(name) for name in ("image", "image", "image", "report")], (400, 1))
    roles[300:, 2] = -1
    t, learnt = noise_levels(roles, list(range(400)), 400, 0, 0, only(translate=1.0))
    assert (learnt.sum(1) == 1).all() and not learnt[:, 3].any() and (t[learnt] > 0).all()
    assert (t[~learnt & (roles >= 0)] == 0).all()
    assert learnt[:300].mean(0)[:3] == pytest.approx([1 / 3] * 3, abs=0.1)
    assert learnt[300:].mean(0)[:2] == pytest.approx([1 / 2] * 2, abs=0.15)
    dropped = ObjectiveOptions(tasks={"translate": 1.0}, condition_dropout=1.0)
    assert (noise_levels(roles, list(range(400)), 400, 0, 0, dropped)[0][~learnt & (roles >= 0)] == 1).all()
    pair = np.tile(BOTH, (8, 1))
    levels = [noise_levels(pair, list(range(8)), 8, 0, 0, only(**{task: 1.0})) for task in ("translate", "image")]
    assert all(np.array_equal(a, b) for a, b in zip(*levels, strict=True))
    lone = np.full((8, 1), ROLES.index("image"))
    assert noise_levels(lone, list(range(8)), 8, 0, 0, only(translate=1.0))[1].all()


@pytest.mark.parametrize("name", ["align", "invariance"])
def test_losses_beside_leave_the_objective_as_it_is(
    batch_of: Any, make_rows: Any, vocabulary: Vocabulary, name: str
) -> None:
    """They add to it with their weight, are functions of features alone, and have a gradient."""
    backbone = BackboneOptions(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = MeDiMModel.from_options(ModelOptions(backbone=backbone, adaln_dim=16, embed=8), vocabulary)
    o = ObjectiveOptions(**{name: 0.5})
    plain = loss(model, batch_of(list(range(8)), ObjectiveOptions()), ObjectiveOptions())
    rows = [row for row in make_rows([4] * 5)]
    first, rng = vocabulary.image[0], np.random.default_rng(1)
    images = [layout([Segment("image", "xray", (first + rng.integers(0, 8, 6)).tolist())], vocabulary) for _ in rows]
    texts = [layout([Segment("report", "text", rng.integers(1, 12, n).tolist())], vocabulary) for n in (2, 5, 3, 4, 6)]
    others = images[::-1] if name == "invariance" else texts
    alone = Alone(Canvas.collate(images, 0), Canvas.collate(others, 0), torch.tensor([0, 0, 0, 1, 1]))
    found = loss(model, replace(batch_of(list(range(8)), o), **{name: alone}), o)
    assert torch.equal(found.total, plain.total) and torch.equal(found.nats, plain.nats)
    assert plain.beside == 0 and not plain.parts.any()
    value = found.parts[("align", "invariance").index(name)]
    assert found.beside.item() == pytest.approx(0.5 * value.item()) and value > 0
    kinds = ("invariant", "invariant") if name == "invariance" else ("image", "text")
    features = [model._embedded(c, kind)[0] for c, kind in zip((alone.images, alone.others), kinds, strict=True)]
    wanted = (
        barlow_twins(*features, alone.group)
        if name == "invariance"
        else info_nce(*features, model.embedder.log_scale[0], alone.group)
    )
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    found.beside.backward()
    assert any(float(p.grad.abs().max()) > 0 for p in model.embedder.parameters() if p.grad is not None)
    padded = Canvas.collate([*texts, texts[1]], 0, 40)  # an embedding does not depend on the rows beside it, or padding
    torch.testing.assert_close(
        model.eval().embed(padded, "text")[:5], model.embed(Canvas.collate(texts, 0), "text"), atol=1e-5, rtol=0
    )
