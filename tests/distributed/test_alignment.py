"""Losses over pairs of all processes: every way of sharing a model gives those of one process."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytestmark = pytest.mark.distributed
SHAPE = "{hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 48}"


@pytest.fixture(scope="module")
def aligned(make_runs: Any) -> Any:
    """Six steps from scratch; `one` is that of one process."""
    runs = make_runs(
        init="", train__steps=6, train__batch_size=4, log__every=1, model__embed=8, model__backbone=SHAPE,
        objective__align=0.5,
    )  # fmt: skip
    runs.run("one")
    return runs


@pytest.mark.parametrize(
    "engine", ["cpu", "fsdp2", *(pytest.param(e, marks=pytest.mark.slow) for e in ("zero2", "zero3"))]
)
def test_pairs_of_all_processes_are_candidates(engine: str, aligned: Any) -> None:
    aligned.run(engine, engine, 2)
    assert aligned.losses(engine) == pytest.approx(aligned.losses("one"), abs=2e-5)
    values = {}
    for name in (engine, "one"):
        lines = (aligned.folder / name / "metrics.jsonl").read_text().splitlines()
        values[name] = [json.loads(line)["loss_align"] for line in lines]
    assert values[engine] == pytest.approx(values["one"], abs=2e-5) and min(values["one"]) > 0
