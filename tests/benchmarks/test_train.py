"""The training benchmark at a tiny size: its ways are the losses they are said to be; its last line can be read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks import train
from medim.model.medim import MeDiMModel
from medim.objective import loss


@pytest.fixture
def case() -> train.Case:
    return train.Case(train.presets()["tiny"], 4, train.parser().parse_args(["--precision", "fp32"]))


def test_the_last_line_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    returned = train.main(["--preset", "tiny", "--repeats", "2", "--batch", "3", "--adaln"])
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said == returned and said["benchmark"] == "train"
    figures = said["figures"]["3"]
    assert list(figures["ways"]) == ["ours", "full", "plain", "ours, no AdaLN"] and not figures["not_run"]
    for way in figures["ways"].values():
        seconds = way["seconds"]
        assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
        assert way["samples_per_second"] == pytest.approx(3 / seconds["median"]) and way["mfu"] is None
    assert figures["ways"]["full"]["samples_per_second_of_full"] == 1
    of = {name: way["flops_per_second"] * way["seconds"]["median"] for name, way in figures["ways"].items()}
    assert of["ours"] == pytest.approx(of["full"]) and of["plain"] == pytest.approx(of["ours, no AdaLN"])
    assert of["plain"] < of["ours"]
    assert figures["positions"]["valid"] <= min(figures["positions"]["ours"], figures["positions"]["padded"])


def test_packed_rows_have_the_loss_of_padded_ones(case: train.Case) -> None:
    model = case.network()
    assert isinstance(model, MeDiMModel)
    assert case.packed.canvas.fill == "packed" and case.padded.canvas.fill == "padded"
    padded = loss(model, case.padded, case.objective).total / case.count
    assert float(case.ours(model).detach()) == pytest.approx(float(padded.detach()), rel=1e-5)
    # AdaLN is zero at the start: without it the network is the same
    assert float(train.NoAdaLN(model).loss(case).detach()) == pytest.approx(float(padded.detach()), rel=1e-5)


def test_full_logits_are_normalised_over_all_columns(case: train.Case) -> None:
    model = case.network()
    rows, targets = torch.cat(case.padded.rows), torch.cat(case.padded.targets)
    assert len(rows) == int((case.labels >= 0).sum()) == case.count
    canvas = case.padded.canvas
    with torch.no_grad():
        hidden = model(canvas.ids, torch.zeros_like(canvas.ids).float(), **model.attention(canvas)).flatten(0, 1)[rows]
        by_hand = functional.cross_entropy(hidden @ model.output_weight.T, targets)
        assert float(case.full(model)) == pytest.approx(float(by_hand), rel=1e-4)
        assert float(case.full(model)) > float(case.ours(model))  # more columns compete


def test_the_plain_trainer_is_causal_and_learns_only_what_was_masked(case: train.Case) -> None:
    model = case.plain_network().eval()
    ids = case.padded.canvas.ids.clone()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        ids[:, -1] = 0
        after = model(input_ids=ids).logits
        assert torch.equal(before[:, :-1], after[:, :-1])
        logits = model(input_ids=case.padded.canvas.ids, attention_mask=case.padded.canvas.valid.long()).logits
        shifted = functional.cross_entropy(logits[:, :-1].flatten(0, 1), case.labels[:, 1:].flatten())
        assert float(case.plain(model)) == pytest.approx(float(shifted), rel=1e-5)


def test_lengths_are_as_unequal_as_reports() -> None:
    drawn = np.array(train.lengths(20_000, 313, 0))
    assert drawn[0] == drawn.max() == 313 and drawn.min() >= 1
    assert np.mean(drawn) == pytest.approx(60, rel=0.03) and np.quantile(drawn, 0.95) == pytest.approx(118, rel=0.05)


def test_steps_learn(case: train.Case) -> None:
    for name, way in case.ways().items():
        trainer = train.Trainer(case, *way)
        first = trainer.step()
        assert [trainer.step() for _ in range(5)][-1] < first, name
