"""The network on one canvas: what is given is computed once, and to the same numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from medim.canvas import Canvas
from medim.diffusion import Group, nelbo
from medim.model.denoiser import BoundDenoiser
from medim.model.medim import MeDiMModel
from medim.sampling import Plan, sample

Rows = Callable[[Sequence[int]], list[Any]]


@pytest.fixture
def prefix(tiny_network: MeDiMModel) -> MeDiMModel:
    """A float64 network whose given segments attend to each other only."""
    tiny_network.config.condition_attention = "prefix"
    return tiny_network.double()


def noised(canvas: Canvas, generate: Tensor, mask_id: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ids with two thirds of `generate` masked, and one level a row there."""
    generator = torch.Generator().manual_seed(seed)
    masked = generate & (torch.rand(generate.shape, generator=generator) < 0.67)
    level = torch.rand(len(generate), 1, generator=generator).expand(generate.shape)
    return torch.where(masked, mask_id, canvas.ids), torch.where(generate, level, 0.0)


def uncached(model: MeDiMModel, canvas: Canvas, generate: Tensor) -> BoundDenoiser:
    return model.denoiser(canvas, generate, cache=False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("role", ["report", "image"])
@pytest.mark.parametrize("lengths", [[5, 5], [8, 3, 5]], ids=["full", "padded"])
def test_what_is_kept_equals_what_is_computed_each_time(
    prefix: MeDiMModel, make_rows: Rows, role: str, lengths: list[int], attention: str
) -> None:
    prefix.backbone.set_attn_implementation(attention)
    canvas = Canvas.collate(make_rows(lengths), 0)
    generate = canvas.has_role(role)
    kept, every = prefix.denoiser(canvas, generate), uncached(prefix, canvas, generate)
    groups = kept.groups(generate)
    for seed in range(3):
        ids, t = noised(canvas, generate, prefix.vocabulary.mask, seed)
        with torch.no_grad():
            (found,), (wanted,) = kept.restricted(ids, t, groups), every.restricted(ids, t, groups)
        tolerance = 1e-9 if attention == "sdpa" else 1e-5  # transformers' eager softmax is float32
        torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)
        assert found.abs().max() > 0.1
    assert kept.tokens < every.tokens  # and it was less work


def test_partly_generated_segments_and_twice_the_rows(prefix: MeDiMModel, make_rows: Rows) -> None:
    """As inpainting under guidance: half of an image is generated; the second branch does not see the report."""
    canvas = Canvas.collate(make_rows([8, 3, 5]), 0)
    generate = canvas.has_role("image") & (canvas.place > 3)
    ids, t = noised(canvas, generate, prefix.vocabulary.mask, 0)
    report = canvas.has_role("report")
    both = torch.cat([ids, torch.where(report, prefix.vocabulary.mask, ids)])
    times = torch.cat([t, torch.where(report, 1.0, t)])
    kept, every = prefix.denoiser(canvas, generate), uncached(prefix, canvas, generate)
    groups = kept.groups(torch.cat([generate, generate]))
    with torch.no_grad():
        for _ in range(2):
            (found,), (wanted,) = kept.restricted(both, times, groups), every.restricted(both, times, groups)
            torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
        (one,) = kept.restricted(ids, t, kept.groups(generate))
    torch.testing.assert_close(one, found[: len(one)], atol=1e-9, rtol=0)
    assert (found[: len(one)] - found[len(one) :]).abs().max() > 1e-3


def test_samples_and_bounds_are_the_same_with_and_without(prefix: MeDiMModel, make_rows: Rows) -> None:
    canvas = Canvas.collate(make_rows([8, 3, 5]), 0)
    report, image = canvas.has_role("report"), canvas.has_role("image")

    def run(make: Callable[[MeDiMModel, Canvas, Tensor], Any]) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"mask_id": prefix.vocabulary.mask, "generator": torch.Generator().manual_seed(1)}
        plan = Plan("ancestral", steps=None, guidance=1.0)
        ids = sample(make(prefix, canvas, report), canvas.ids, report, plan, condition=image, **options)
        return ids, nelbo(make(prefix, canvas, report), canvas.ids, report, n_times=6, **options)

    (ids, bound), (ids_too, bound_too) = run(lambda m, c, g: m.denoiser(c, g)), run(uncached)
    assert torch.equal(ids, ids_too)
    torch.testing.assert_close(bound, bound_too, atol=1e-5, rtol=0)


def test_given_segments_do_not_see_generated_ones(prefix: MeDiMModel, make_rows: Rows) -> None:
    canvas = Canvas.collate(make_rows([8, 3, 5]), 0)
    report = canvas.has_role("report")
    t = torch.zeros(canvas.ids.shape)
    given = canvas.outside(report)

    def states(ids: Tensor) -> Tensor:
        with torch.no_grad():
            return prefix(ids, t, **prefix.attention(canvas, given))

    before, after = states(canvas.ids), states(torch.where(report, prefix.vocabulary.mask, canvas.ids))
    assert torch.equal(before[given], after[given])
    assert (before[report] - after[report]).abs().amax(1).min() > 1e-3
    moved = states(torch.where(canvas.place == 1, canvas.ids.roll(1, 1), canvas.ids))
    assert (moved[report] - before[report]).abs().amax(1).min() > 1e-5  # but are seen by them


def test_the_prefix_is_trained_as_it_is_sampled(prefix: MeDiMModel, make_rows: Rows) -> None:
    """The hidden states of a training batch are those that a sampler's pass computes."""
    from medim.objective import ObjectiveOptions, make_batch

    o = ObjectiveOptions(tasks={"report": 1.0}, condition_dropout=0.5, condition_attention="prefix")
    canvas, mask = Canvas.collate(make_rows([8, 3, 5, 6]), 0), prefix.vocabulary.mask
    batch = make_batch(canvas, range(4), 4, 0, 0, o, mask)
    assert batch.given is not None and set(batch.t[:, 0].tolist()) == {0.0, 1.0}
    report = canvas.has_role("report")
    assert torch.equal(batch.given, canvas.valid & ~report)
    level = torch.where(canvas.segment < 0, 2, canvas.segment)
    tagged = torch.cat([batch.t, torch.zeros(4, 1)], 1)
    denoiser = prefix.denoiser(canvas, report)
    groups = denoiser.groups(report)
    with torch.no_grad():
        trained = prefix(batch.canvas.ids, tagged, level, **prefix.attention(batch.canvas, batch.given))
        (sampled,) = denoiser.restricted(batch.canvas.ids, tagged.gather(1, level), groups)
    wanted = trained.flatten(0, 1)[groups[0].rows] @ prefix.output_weight[groups[0].start : groups[0].stop].T
    torch.testing.assert_close(sampled, wanted, atol=1e-9, rtol=0)


def test_a_stale_memory_is_exact_when_fresh_and_says_its_drift(tiny_network: MeDiMModel, make_rows: Rows) -> None:
    model = tiny_network.double()
    canvas = Canvas.collate(make_rows([8, 3, 5]), 0)
    report = canvas.has_role("report")
    exact, stale = model.denoiser(canvas, report), model.denoiser(canvas, report, refresh=3)
    groups, gaps = exact.groups(report), []
    for seed in range(7):
        ids, t = noised(canvas, report, model.vocabulary.mask, seed)
        with torch.no_grad():
            (found,), (wanted,) = stale.restricted(ids, t, groups), exact.restricted(ids, t, groups)
        gaps.append(float((found - wanted).abs().max()))
    assert max(gaps[0], gaps[3], gaps[6]) == 0 and min(gaps[1], gaps[2], gaps[4], gaps[5]) > 1e-4
    assert stale.drift is not None and stale.drift > 1e-7 and exact.drift is None
    with pytest.raises(ValueError, match="at least 1"):
        model.denoiser(canvas, report, refresh=0)


def test_levels_by_segment_are_those_told_by_position(tiny_network: MeDiMModel, make_rows: Rows) -> None:
    canvas = Canvas.collate(make_rows([8, 3]), 0)
    generate = canvas.has_role("report") | (canvas.place > 2)
    t = torch.where(canvas.has_role("report"), 0.4, 0.7) * generate
    t = torch.where(canvas.place == 1, 1.0, t)  # not generated and unknown
    denoiser = tiny_network.denoiser(canvas, generate)
    groups = denoiser.groups(generate)
    with torch.no_grad():
        found = denoiser.restricted(canvas.ids, t, groups)
        hidden = tiny_network(canvas.ids, t, None, **tiny_network.attention(canvas)).flatten(0, 1)
    for part, group in zip(found, groups, strict=True):
        assert isinstance(group, Group)
        wanted = hidden[group.rows] @ tiny_network.output_weight[group.start : group.stop].T
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=0)


def test_a_copy_of_the_network_is_not_needed(prefix: MeDiMModel, make_rows: Rows) -> None:
    """Two canvases bound to one network keep apart what they remember."""
    canvases = [Canvas.collate(make_rows([4, 6])[i : i + 1], 0) for i in (0, 1)]
    bound = [prefix.denoiser(c, c.has_role("report")) for c in canvases]
    alone = [copy.deepcopy(prefix).denoiser(c, c.has_role("report")) for c in canvases]
    for _ in range(2):
        for c, one, other in zip(canvases, bound, alone, strict=True):
            t, groups = torch.where(c.has_role("report"), 0.5, 0.0), one.groups(c.has_role("report"))
            with torch.no_grad():
                assert torch.equal(one.restricted(c.ids, t, groups)[0], other.restricted(c.ids, t, groups)[0])
