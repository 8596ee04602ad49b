"""The head's benchmark at a tiny size: its last line can be read, and its counts are right."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn import functional

from benchmarks import head, report

SMALL = ["--codes", "12", "--text", "4", "--width", "8", "--repeats", "2", "--batch", "3"]


def test_the_last_line_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--vocabulary", "60+20+2", "40+9+0", *SMALL]
    returned = head.main(argv)
    lines = capsys.readouterr().out.splitlines()
    said = json.loads(lines[-1])
    assert said == returned and set(said) == {"benchmark", "command", "device", "versions", "seed", "figures"}
    assert said["command"].startswith("python -m benchmarks.head --vocabulary 60+20+2 40+9+0")
    assert "torch" in said["versions"] and said["device"]
    assert list(said["figures"]) == ["82", "49"]
    for found in said["figures"].values():
        assert {"full", "rows", "restricted"} <= set(found["ways"])
        for way in found["ways"].values():
            time = way["seconds"]
            assert 0 < time["min"] <= time["median"] <= time["max"]
        assert found["ways"]["full"]["seconds_of_full"] == 1
    # 3 rows of 12 codes and 4 text tokens, half of each masked
    floor = said["figures"]["82"]["floor"]
    assert floor["logits"] == {"full": 48 * 82, "rows": 24 * 82, "restricted": 6 * 60 + 18 * 20}
    assert floor["gflop"]["full"] == pytest.approx(6 * 8 * 48 * 82 / 1e9)


def test_the_ways_are_the_losses_that_they_are_said_to_be() -> None:
    case = head.Case.make((60, 20, 2), head.parser().parse_args(SMALL))
    values = {name: float(way().detach()) for name, way in case.ways().items()}
    logits = case.head.weight @ case.hidden.detach().flatten(0, 1)[case.rows].T
    text, codes = case.counts
    assert (text, codes) == (6, 18)
    wanted = [logits[:60, :text], logits[62:, text:]]
    targets = case.targets[:text], case.targets[text:] - 62
    of_own = sum(
        float(functional.cross_entropy(one.T, target, reduction="sum").detach())
        for one, target in zip(wanted, targets, strict=True)
    )
    of_all = float(functional.cross_entropy(logits.T, case.targets, reduction="sum").detach())
    assert values["full"] == pytest.approx(of_all, rel=1e-5) and values["rows"] == pytest.approx(of_all, rel=1e-5)
    assert values["restricted"] == pytest.approx(of_own, rel=1e-5)
    assert values["restricted, 2 calls"] == pytest.approx(of_own, rel=1e-5)


@pytest.mark.parametrize("wrong", ["32000", "a+b+c", "1+2"])
def test_a_vocabulary_that_is_none_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        head.main(["--vocabulary", wrong])
    assert "three numbers" in capsys.readouterr().err


def test_the_peak_is_that_of_the_call() -> None:
    peak = report.peak_memory(lambda: float((torch.ones(4, 2**20) + 1).sum()), "cpu")
    if peak is None:
        pytest.skip("no /proc")
    assert peak >= 31 * 2**20  # two of 16; the kernel counts pages in batches
    assert peak < 3 * 16 * 2**20
    small = report.peak_memory(lambda: float(torch.ones(2**20).sum()), "cpu")
    assert small is not None and 3 * 2**20 <= small < 8 * 2**20  # nothing is left of the larger one


def test_repeats_come_in_turn() -> None:
    calls: list[str] = []
    taken = report.seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, "cpu")
    assert calls == ["a", "b"] * 3 and [len(one) for one in taken.values()] == [2, 2]
    assert math.isclose(report.spread([3.0, 1.0, 2.0])["median"], 2.0)


def test_a_table_has_aligned_columns() -> None:
    assert report.table([["name", "n"], ["a", "10"]]) == "name   n\n--------\na     10"
