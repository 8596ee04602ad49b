"""The page of a comparison: what it says of B, its axes, and that it comes from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from eval import bench, compare, page
from eval.compare import Line
from medim.metrics.statistics import Sums

BETTER = Line("xray/report/bleu-4", 0.10, 0.15, 0.03, 0.07, 0.0001, 0.0004, True)
WORSE = Line("xray/report/repetition", 0.01, 0.05, 0.02, 0.06, 0.002, 0.006, False)
UNSURE = Line("xray/report/coherence", 0.80, 0.78, -0.06, 0.02, 0.31, 0.62, True)
NEITHER = Line("xray/report/length_ratio", 0.9, 1.1, 0.15, 0.25, 0.001, 0.004, None)
WHOLE = Line("xray/pair/fid/vq@96/png/n=48", 41.0, 39.5, higher=False)
UNDEFINED = Line("xray/pair/coherence", None, 0.5, math.nan, math.nan, 1.0, 1.0, True)
EQUAL = Line("xray/pair/failed", 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, False)
LINES = [BETTER, WORSE, UNSURE, NEITHER, WHOLE, UNDEFINED, EQUAL]


def side(name: str) -> dict[str, Any]:
    results = {"model": f"<b>{name}</b>", "protocol_file": "eval/demo.yaml", "seeds": [0], "model_sha256": "0123abcd"}
    return {"folder": f"out/{name}", "results": results}


def test_what_is_said_of_b():
    said = [(row["side"], row["verdict"]) for row in map(page._compared, LINES)]
    assert said == [
        ("better", "better"),
        ("worse", "worse"),
        ("worse", "no difference shown"),
        ("neither", "differs"),
        ("better", "not tested"),
        ("neither", "undefined"),
        ("neither", "no difference shown"),
    ]


def test_zero_is_in_the_middle():
    row = page._compared(UNSURE)
    assert row["reach"] == pytest.approx(0.066)
    assert row["at_low"] < row["at_dot"] < 0.5 < row["at_high"]
    assert row["at_dot"] == pytest.approx((-0.02 / 0.066 + 1) / 2)
    assert page._compared(EQUAL)["at_dot"] is None  # no scale: it is drawn on zero


def test_nothing_undefined_is_shown_and_nothing_fetched():
    html = page.render_comparison(LINES, side("a"), side("b"))
    assert "<script" not in html and "<b>a" not in html and "&lt;b&gt;a" in html
    assert "http" not in html and "url(" not in html and " src=" not in html
    body = html.partition("</style>")[2]
    assert "None" not in body and "nan" not in body.lower()
    assert "vq@96 · png · n=48" in body and "&lt; 0.001" in body


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
def test_in_a_browser(width, scheme, browser, tmp_path):
    path = tmp_path / "a-b.html"
    path.write_text(page.render_comparison(LINES, side("a"), side("b")), encoding="utf-8")
    browser.open(path, width, scheme)
    assert browser.width() == (width, width)
    shot = browser.shoot(tmp_path / f"{width}-{scheme}.png")
    assert shot.width == width and shot.height > 700
    assert len(shot.getcolors(1 << 24)) > 100
    shown = browser.figures()
    assert len(shown) == len(LINES)
    for line in LINES:
        exact, text = shown[tuple(line.name.split("/", 2))]
        assert (json.loads(exact) if exact else None) == line.difference
        assert text == page._plus(line.difference)


def save(folder: Path, values: np.ndarray) -> None:
    folder.mkdir()
    sums = Sums.mean(values.tolist())
    rows = [{"study": f"s{i}", "patient": f"p{i}"} for i in range(len(values))]
    figures = {
        "rouge_l": {"value": sums.value, "n": len(values), "higher": True},
        "fid/vq@96/png/n=20": {"value": 3.0, "n": len(values), "higher": False},
    }
    results = side(folder.name)["results"] | {"domains": {"xray": {"tasks": {"report": {}}}}}
    results["domains"]["xray"]["tasks"]["report"] = {"figures": figures, "rows": rows}
    (folder / "results.json").write_text(json.dumps(results))
    bench.save_sums(folder / "scores.npz", {"xray/report/rouge_l": sums})


def test_from_the_command_line(tmp_path, capsys):
    values = np.random.default_rng(0).random(20)
    save(tmp_path / "a", values)
    save(tmp_path / "b", values + 0.1)
    folders = [str(tmp_path / name) for name in "ab"]
    out = tmp_path / "new" / "a-b.html"
    assert compare.main([*folders, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    assert [line["higher"] for line in json.loads(printed.out)] == [True, False]
    assert str(out) in printed.err
    html = out.read_text(encoding="utf-8")
    assert "of 1 figure tested" in html and '<td class="better">better</td>' in html and "+0.100" in html

    assert compare.main([*folders, "--figure", "fid/vq@96/png/n=20"]) == 0
    assert "rouge_l" not in capsys.readouterr().out
    for bad, said in ((tmp_path / "a-b.txt", "ends in .html"), (tmp_path / "a" / "results.json" / "x.html", "written")):
        assert compare.main([*folders, "--out", str(bad)]) == 2
        assert said in capsys.readouterr().err
