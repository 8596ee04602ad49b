"""The fixed set: the same figures however it is shared out, and those of a computation by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from medim.canvas import Canvas
from medim.diffusion import nelbo_tokens
from medim.objective import ObjectiveOptions, count, loss, make_batch
from medim.training.validation import NOISE, Validation, ValidationOptions
from medim.vocabulary import KINDS

LENGTHS = (4, 7, 5, 6, 8, 4, 5)
DOMAINS = ("xray", "xray", "ct", "xray", "ct", "ct", "xray")


def make(vocabulary: Any, rows: Sequence[Any], size: int = 3, **objective: Any) -> Validation:
    o = ValidationOptions(every=1, batch_size=size)
    return Validation(rows, DOMAINS, o, ObjectiveOptions(**objective), vocabulary.eos, vocabulary.mask)


def together(validation: Validation, model: Any, world: int) -> dict[str, float]:
    """What `world` processes find together: each runs, and all of them add their sums."""
    sums: list[list[torch.Tensor]] = []
    for rank in range(world):
        mine: list[torch.Tensor] = []

        def keep(value: torch.Tensor, mine: list[torch.Tensor] = mine) -> torch.Tensor:
            mine.append(value)
            return value

        validation(model, rank, world, torch.device("cpu"), keep)
        sums.append(mine)
    totals = iter(torch.stack(same).sum(0) for same in zip(*sums, strict=True))
    return validation(model, 0, world, torch.device("cpu"), lambda value: next(totals))


@pytest.mark.parametrize(("size", "world"), [(3, 1), (1, 1), (100, 1), (3, 2), (2, 3), (3, 8)])
def test_figures_do_not_depend_on_how_it_is_shared(
    size: int, world: int, vocabulary: Any, make_rows: Callable[..., Any], tiny_network: Any
) -> None:
    rows = make_rows(LENGTHS)
    whole = together(make(vocabulary, rows), tiny_network, 1)
    assert together(make(vocabulary, rows, size), tiny_network, world) == pytest.approx(whole, abs=2e-6)


def test_the_figures_are_those_of_the_objective(
    vocabulary: Any, make_rows: Callable[..., Any], tiny_network: Any
) -> None:
    rows, o = make_rows(LENGTHS), ObjectiveOptions(condition_dropout=0.5)
    found = together(make(vocabulary, rows, condition_dropout=0.5), tiny_network, 1)
    total, number = 0.0, 0.0
    for task in ("pair", "report", "image"):
        one = replace(o, tasks={task: 1.0}, condition_dropout=0.0)
        batch = make_batch(Canvas.collate(rows, vocabulary.eos), range(7), 7, 0, NOISE, one, vocabulary.mask)
        with torch.no_grad():
            sums = loss(tiny_network, batch, one)
        total, number = total + float(sums.total), number + count(batch, one)
        for kind in ("text", "image"):
            assert (f"{task}/xray/{kind}" in found) == (task in ("pair", {"text": "report", "image": "image"}[kind]))
    assert found["loss"] == pytest.approx(total / number, abs=2e-6)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_bits_a_token_are_those_of_the_bound(
    schedule: Any, vocabulary: Any, make_rows: Callable[..., Any], tiny_network: Any
) -> None:
    """Against `nelbo_tokens`, whose noise and whose integral are others."""
    rows = make_rows([6, 9] * 1500)
    tiny_network.config.schedule = schedule
    o = ValidationOptions(every=1, batch_size=500, tasks=("joint", "report"))
    validation = Validation(
        rows, ["xray"] * 3000, o, ObjectiveOptions(schedule=schedule), vocabulary.eos, vocabulary.mask
    )
    found = together(validation, tiny_network, 1)
    canvas = Canvas.collate(rows[:400], vocabulary.eos)
    for task, kinds in (("joint", ("text", "image")), ("report", ("text",))):
        generate = canvas.has_role("report") if task == "report" else canvas.segment >= 0
        nats = nelbo_tokens(
            tiny_network.denoiser(canvas, generate),
            canvas.ids,
            generate,
            mask_id=vocabulary.mask,
            n_times=16,
            generator=torch.Generator().manual_seed(0),
            schedule=tiny_network.schedule,
        ).mean(0)
        for kind in kinds:
            where = generate & (canvas.kind == KINDS.index(kind))
            assert found[f"{task}/xray/{kind}/token"] == pytest.approx(float(nats[where].mean()), abs=0.08)
    assert "joint/xray/text/token" in found and "image/xray/image" not in found


def test_the_noise_is_not_the_runs(vocabulary: Any, make_rows: Callable[..., Any], tiny_network: Any) -> None:
    """Neither its task mixture nor its dropout changes a figure of a task; only the weights of kinds change `loss`."""
    rows = make_rows(LENGTHS)
    one = together(make(vocabulary, rows), tiny_network, 1)
    other = make(vocabulary, rows, tasks={"report": 1.0}, condition_dropout=0.9)
    assert together(other, tiny_network, 1) == one
    heavy = together(make(vocabulary, rows, modality_weights={"text": 9.0, "image": 1.0}), tiny_network, 1)
    assert heavy["loss"] != one["loss"] and {**heavy, "loss": 0} == {**one, "loss": 0}
