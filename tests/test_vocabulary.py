"""The joint vocabulary: ranges that do not overlap, exact saving, and one line for each mistake."""

from __future__ import annotations

import json

import pytest

from medim.errors import UserError
from medim.vocabulary import MODALITIES, Vocabulary


@pytest.mark.parametrize(("rows", "first"), [(0, 100), (60, 100), (128, 128)])
def test_every_id_has_one_meaning(rows: int, first: int) -> None:
    vocabulary = Vocabulary.build(text_size=100, eos=7, codebook_size=16, rows=rows)
    assert vocabulary.text == (0, 100) and vocabulary.image == (first, first + 16)
    tags = sorted(vocabulary.tags.values())
    assert tags == list(range(first + 16, first + 16 + len(tags)))
    assert vocabulary.size == tags[-1] + 1
    assert vocabulary.columns("text") == vocabulary.text and vocabulary.columns("image") == vocabulary.image
    assert vocabulary.mask == vocabulary.tags["mask"]
    assert {vocabulary.modality_tag(name) for name in MODALITIES} < set(tags)
    assert vocabulary.text[0] <= vocabulary.eos < vocabulary.text[1]


def test_size_counts_the_largest_range() -> None:
    """A backbone with image rows of its own may have its tags below its codes."""
    assert Vocabulary((0, 10), (50, 80), 0, {"mask": 20}).size == 80
    assert Vocabulary((0, 90), (50, 80), 0, {"mask": 20}).size == 90


def test_comes_back_from_json() -> None:
    vocabulary = Vocabulary.build(text_size=100, eos=7, codebook_size=16)
    assert Vocabulary.from_dict(json.loads(json.dumps(vocabulary.to_dict()))) == vocabulary


@pytest.mark.parametrize("change", [{"text": None}, {"image": [3]}, {"eos": "missing"}])
def test_a_broken_file_is_told(change: dict[str, object]) -> None:
    data = {**Vocabulary.build(text_size=100, eos=7, codebook_size=16).to_dict(), **change}
    if data["eos"] == "missing":
        del data["eos"]
    with pytest.raises(UserError, match="not a vocabulary"):
        Vocabulary.from_dict(data)


def test_unknown_modality() -> None:
    vocabulary = Vocabulary.build(text_size=100, eos=7, codebook_size=16)
    with pytest.raises(UserError, match=r"unknown modality 'sonar': this vocabulary has xray, pathology"):
        vocabulary.modality_tag("sonar")
    with pytest.raises(UserError, match="unknown modality 'mask'"):  # a tag, but of no modality
        vocabulary.modality_tag("mask")
    old = Vocabulary((0, 10), (10, 20), 0, {"mask": 20, "xray": 21})
    with pytest.raises(UserError, match=r"unknown modality 'ct': this vocabulary has xray$"):
        old.modality_tag("ct")


def test_check_names_what_differs() -> None:
    vocabulary = Vocabulary.build(text_size=100, eos=7, codebook_size=16)
    vocabulary.check(100, 7, 16, "here")
    with pytest.raises(UserError, match=r"some/folder: .*image codes: vocabulary 16, tokenizer 32\)") as told:
        vocabulary.check(100, 7, 32, "some/folder")
    assert "text tokens" not in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"text tokens: vocabulary 100, tokenizer 101; end-of-text id"):
        vocabulary.check(101, 8, 16, "some/folder")
