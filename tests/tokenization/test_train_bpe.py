"""tokenizers/train_bpe.py, by its command."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from medim.data import prepare
from medim.data.studies import Image, Study
from medim.tokenization.joint import JointTokenizer
from medim.tokenization.text import TextTokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture
def main() -> Callable[[Sequence[str]], int]:
    """The script's command; it is no module: nothing under tokenizers/ is imported."""
    found: Any = runpy.run_path(str(ROOT / "tokenizers" / "train_bpe.py"))["main"]
    return found


def test_the_reports_of_a_dataset(
    main: Callable[[Sequence[str]], int], tiny_joint: JointTokenizer, tmp_path: Path
) -> None:
    """Those of the split train only, whatever text tokenizer it was prepared with."""
    pixels = PIL.Image.fromarray(np.zeros((96, 96), np.uint8))
    studies = [
        Study(f"s{n}", "p", (Image("xray", pixels),), words, split=split)
        for n, (words, split) in enumerate((("Zygapophyseal.", "train"), ("Quixotic.", "test")))
    ]
    prepare.prepare(lambda: studies, prepare.Encoding(tiny_joint.image, tiny_joint.text), tmp_path / "data", source="x")
    assert main(["--data", str(tmp_path / "data"), "--out", str(tmp_path / "bpe"), "--vocab-size", "300"]) == 0
    text = TextTokenizer.from_pretrained(tmp_path / "bpe")
    known, unknown = text.encode("Zygapophyseal."), text.encode("Quixotic.")
    assert len(known) < len("Zygapophyseal.") / 2 and len(unknown) > len("Quixotic.") / 2
    assert (text.decode(known), text.decode(unknown)) == ("Zygapophyseal.", "Quixotic.")
    assert json.loads((tmp_path / "bpe" / "manifest.json").read_text())["text"] == str(tmp_path / "data")


def test_mistakes_are_one_line(
    main: Callable[[Sequence[str]], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flag in ("--text", "--data"):
        assert main([flag, str(tmp_path / "nowhere"), "--out", str(tmp_path / "bpe")]) == 2
        said = capsys.readouterr().err
        assert "nowhere" in said and said.count("\n") == 1 and not (tmp_path / "bpe").exists()
