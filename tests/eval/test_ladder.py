"""What must move a figure moves it, and in the right direction: real studies as outputs, spoilt step by step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import PIL.ImageFilter
import pytest

from eval.compare import compare
from eval.compare import main as compare_main
from eval.protocol import Protocol
from eval.run import main
from eval.studies import read_studies
from medim.data.studies import Study

N = 48
PROTOCOL = f"""
domains: [xray]
studies: {N}
tasks: [pair, report]
text: [bleu, rouge_l, rule_f1, distinct, repetition, length_ratio, empty]
image: [fid, kid, prdc, ms_ssim]
likelihood: {{studies: 0}}
bootstrap: 200
"""
Spoil = Callable[[int, list[Study]], tuple[PIL.Image.Image | None, str | None]]


def real(i: int, studies: list[Study]) -> tuple[PIL.Image.Image, str]:
    image = studies[i].images[0].pixels
    assert isinstance(image, PIL.Image.Image)
    return image, studies[i].report


def swapped(text: str) -> str:
    return text.replace("left", "\0").replace("right", "left").replace("\0", "right").replace("Left", "\0").replace(
        "Right", "Left").replace("\0", "Right")  # fmt: skip


SPOILT: dict[str, Spoil] = {
    "same": lambda i, s: real(i, s),
    "shuffled": lambda i, s: (real(i, s)[0], real((i + 7) % N, s)[1]),
    "blurred": lambda i, s: (real(i, s)[0].filter(PIL.ImageFilter.GaussianBlur(4)), real(i, s)[1]),
    "repeated": lambda i, s: (real(0, s)[0], real(0, s)[1]),
    "swapped": lambda i, s: (real(i, s)[0], swapped(real(i, s)[1])),
    "missing": lambda i, s: (None, None) if i % 20 == 3 else real(i, s),
}


@pytest.fixture(scope="module")
def rungs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of an evaluation of each."""
    root = tmp_path_factory.mktemp("ladder")
    (root / "ladder.yaml").write_text(PROTOCOL)
    (studies,) = read_studies(Protocol(domains=("xray",)), "test", N).values()
    for name, spoil in SPOILT.items():
        folder = root / f"{name}-outputs"
        folder.mkdir()
        for i in range(N):
            image, report = spoil(i, studies)
            if image is not None:
                image.save(folder / f"image_{i}.png")
            if report is not None:
                (folder / f"text_{i}.txt").write_text(report)
        assert main([str(root / "ladder.yaml"), "--predictions", str(folder), "--out", str(root / name)]) == 0
    return {name: root / name for name in SPOILT}


@pytest.fixture(scope="module")
def figures(rungs: dict[str, Path]) -> Callable[[str, str, str], float]:
    found: dict[str, Any] = {}
    for name, folder in rungs.items():
        found[name] = json.loads((folder / "results.json").read_text())["domains"]["xray"]["tasks"]

    def figure(rung: str, task: str, name: str) -> float:
        (value,) = (v["value"] for key, v in found[rung][task]["figures"].items() if key.split("/")[0] == name)
        return float(value)

    return figure


def test_real_studies_are_perfect(figures: Callable[[str, str, str], float]) -> None:
    for name in ("bleu-1", "bleu-4", "rouge_l", "rule_f1", "findings_f1", "length_ratio"):
        assert figures("same", "report", name) == pytest.approx(1.0), name
    assert figures("same", "pair", "coherence") > 0.95
    assert figures("same", "pair", "fid") == pytest.approx(0, abs=1e-6)
    for name in ("precision", "recall", "coverage"):
        assert figures("same", "pair", name) == 1.0
    assert figures("same", "report", "failed") == 0


@pytest.mark.parametrize(
    ("rung", "moved"),
    [
        ("shuffled", {"coherence": -0.3, "rouge_l": -0.1, "bleu-4": -0.2, "findings_f1": -0.3, "rule_f1": -0.1}),
        ("swapped", {"coherence": -0.2, "bleu-4": -0.02, "findings_f1": -0.2, "side_accuracy": -0.9}),
        ("blurred", {"coherence": -0.1, "precision": -0.3, "fid": 1.0}),
        ("repeated", {"recall": -0.5, "coverage": -0.5, "ms_ssim": 0.1, "distinct_2": -0.1}),
        ("missing", {"failed": 0.04, "rouge_l": -0.04, "coherence": -0.005, "bleu-1": -0.01, "empty": 0.04}),
    ],
)
def test_each_rung_moves_what_it_should(
    rung: str, moved: dict[str, float], figures: Callable[[str, str, str], float]
) -> None:
    for name, least in moved.items():
        task = "report" if name in ("rouge_l", "bleu-1", "bleu-4", "findings_f1", "rule_f1") else "pair"
        change = figures(rung, task, name) - figures("same", task, name)
        assert change / least > 1, (name, change)


def test_what_a_rung_leaves_alone_stays(figures: Callable[[str, str, str], float]) -> None:
    for rung in ("shuffled", "swapped"):  # the images are the same
        for name in ("fid", "recall", "ms_ssim"):
            assert figures(rung, "pair", name) == pytest.approx(figures("same", "pair", name), abs=1e-9)
    assert figures("blurred", "report", "bleu-4") == figures("same", "report", "bleu-4")
    sideless = figures("same", "pair", "coherence_sideless")
    assert figures("swapped", "pair", "coherence_sideless") == pytest.approx(sideless)
    assert figures("swapped", "report", "rule_f1") == pytest.approx(1.0)  # its findings have no sides


def test_the_page_shows_it(rungs: dict[str, Path]) -> None:
    page = (rungs["missing"] / "report.html").read_text()
    assert "no image, no report" in page
    assert 'data-figure="coherence"' in page


def test_compare_tells_a_difference_from_none(rungs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    found = {line.name: line for line in compare(rungs["same"], rungs["shuffled"])}
    worse = found["xray/report/rouge_l"]
    assert worse.difference is not None and worse.difference < -0.1
    assert worse.p is not None and worse.p < 0.01 and worse.corrected is not None and worse.corrected < 0.05
    assert found["xray/pair/distinct_1"].p is None  # of the whole set
    assert {line.p for line in compare(rungs["same"], rungs["same"]) if line.p is not None} == {1.0}
    assert compare_main([str(rungs["same"]), str(rungs["blurred"]), "--figure", "coherence"]) == 0
    said = capsys.readouterr().out
    assert "xray/pair/coherence" in said and "rouge" not in said
    assert compare_main([str(rungs["same"]), str(rungs["same"].parent)]) == 2
    assert "has no results.json" in capsys.readouterr().err
