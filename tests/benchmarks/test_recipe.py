"""The ladder of recipes: each is one change from another, all are configs, figures are what they are said to be."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import recipe
from medim.config import load
from medim.recipe import TrainConfig


def test_each_rung_is_one_change_from_what_was_kept_below_it() -> None:
    found = recipe.recipes()
    assert found["paper"] == (recipe.PAPER, "")
    for name, rung in recipe.LADDER.items():
        settings, below = found[name]
        assert below == "paper" or recipe.LADDER[below].kept
        assert {key: value for key, value in settings.items() if found[below][0].get(key) != value} == rung.settings
    top = [name for name, rung in recipe.LADDER.items() if rung.kept][-1]
    assert found["ours"] == (found[top][0], "paper")


def test_all_recipes_are_configs_of_one_network_but_for_their_rungs() -> None:
    made = {
        name: load(recipe.CONFIG, recipe.overrides(settings, Path("none"), 0, 0), TrainConfig)
        for name, (settings, _) in recipe.recipes().items()
    }
    assert len({repr(one) for one in made.values()}) == len(made) - 1  # "ours" is the top of the ladder
    for one in made.values():
        assert one.model.backbone.hidden_size == 96 and one.train.batch_size == 8
        assert one.train.lr == (2e-3 if one.train.optimizer == "muon" else 1e-3)
    assert made["paper"].objective.tasks == {"pair": 0, "report": 0, "image": 0, "joint": 1}
    cost = {name: recipe.flops(recipe.recipes()[name][0]) for name in recipe.LADDER}
    assert 0 < cost["narrow AdaLN"] < cost["averaged weights"]
    assert cost["Muon"] > cost["2-D positions"]  # its orthogonalisations count
    quick = recipe.recipes(quick=True)
    assert [name for name in quick if name in recipe.LADDER] == [k for k, rung in recipe.LADDER.items() if rung.kept]
    assert quick["ours"] == recipe.recipes()["ours"]
    assert recipe.recipes(ends=True) == {name: recipe.recipes()[name] for name in ("paper", "ours")}


def test_a_gain_is_one_minus_the_geometric_mean_of_the_ratios() -> None:
    other = dict.fromkeys(recipe.CELLS, 4.0)
    assert recipe.gain(dict.fromkeys(recipe.CELLS, 3.0), other) == pytest.approx(0.25)
    assert recipe.gain(other | {recipe.CELLS[0]: 2.0}, other) == pytest.approx(1 - 0.5 ** (1 / 8))


def test_bits_of_a_report_hold_those_of_its_length(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    slots = {"xray": {"8": 3, "16": 1}, "pathology": {"8": 4}}
    (tmp_path / "final/report_slots.json").write_text(json.dumps(slots))
    row = {"step": 7} | {f"{cell}/token": math.log(2) / 2 for cell in recipe.CELLS}
    (tmp_path / "validation.jsonl").write_text(json.dumps(row) + "\n")
    (point,) = recipe.curve(tmp_path)
    assert point["report/xray/text"] == pytest.approx(10 / 2 + 2 - 0.75 * math.log2(3))
    assert point["joint/pathology/text"] == pytest.approx(4)
    assert point["image/xray/image"] == point["joint/pathology/image"] == pytest.approx(0.5)
    assert point["token/pathology"] == pytest.approx(0.5)
    assert point["token/xray"] == pytest.approx((point["joint/xray/text"] + 72) / 154)
    assert point["token/both"] == pytest.approx((point["token/xray"] + 0.5) / 2)
