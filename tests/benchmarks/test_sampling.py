"""The benchmark of sampling at a tiny size: what it compares is the same work, and its last line can be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import sampling


def test_the_last_line_is_the_report(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", str(tiny_model), "--n", "8", "--repeats", "1", "--batch-size", "8", "--device", "cpu"]
    assert sampling.main(small) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["benchmark"] == "sampling" and found["seed"] == 0
    figures = found["figures"]
    assert figures["batch"]["same_samples"] == figures["batch"]["samples"] == 8
    for name in ("batch 1", "batch 8"):
        row = figures["cache"][name]
        assert row["same_reports"] and row["times_faster"] == row["seconds"]["uncached"] / row["seconds"]["cached"]
    ways = figures["plans"]["ways"]
    assert len(ways) == 3 and all(0 <= way["coherence"] <= 1 for way in ways.values())
    passes = {name: way["forward_passes"] for name, way in ways.items()}
    assert passes["own plan"] <= 16 + 16 < passes["confidence 128, together"] <= 48
    assert figures["plans"]["passes_ratio"] == passes["own plan"] / 128
