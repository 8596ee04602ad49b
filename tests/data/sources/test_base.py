"""What all readers share: splits by hash, unique ids, text files of any encoding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from medim.data.sources.base import read_text, split_of, unique
from medim.data.studies import Skipped, Study


def test_splits_are_stable_and_of_the_right_size() -> None:
    counts = Counter(split_of(f"p{n}") for n in range(10_000))
    assert abs(counts["test"] - 1000) < 120 and abs(counts["validation"] - 1000) < 120  # 4 standard deviations
    assert [split_of(f"p{n}") for n in range(8)] == [
        "train", "test", "train", "train", "train", "train", "train", "train",
    ]  # fmt: skip  # another hash would move patients from train to test


def test_ids_are_unique() -> None:
    studies = [Study(name, "p", (), "") for name in ("a", "b", "a")]
    found = list(unique([*studies, Skipped("b", "b.png", "broken")]))
    assert found[:2] == studies[:2]
    assert found[2] == Skipped("a", "", "a study of this id came before")
    assert found[3].id == "b"


@pytest.mark.parametrize("raw", ["Größe".encode(), "Größe".encode("utf-8-sig"), "Größe".encode("cp1252")])
def test_text_of_any_encoding(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "r.txt").write_bytes(raw)
    assert read_text(tmp_path / "r.txt") == "Größe"
