"""Tokenised datasets: exact codes, shards that survive a kill, and no mixing of tokenizers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medim.data import phantom, prepare
from medim.data.studies import Study
from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer, prepare_image

TOTAL = 10


def studies(start: int) -> Iterator[Study]:
    return (phantom.study(0, index) for index in range(start, TOTAL))


def make(tokenizer: VQTokenizer, out: Path, shard_size: int = 4, total: int = TOTAL) -> list[dict[str, object]]:
    return list(prepare.prepare(studies, tokenizer, out, total=total, shard_size=shard_size))


@pytest.fixture(scope="module")
def tokenizer() -> VQTokenizer:
    torch.manual_seed(0)
    made = VQTokenizer(VQConfig(resolution=96, ch_mult=(1, 1), z_channels=8, embed_dim=4, n_embed=16, patch=8)).eval()
    with torch.no_grad():
        made.quantize.embedding.weight.normal_(std=0.3)
    return made


def test_records_are_the_studies(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    records = make(tokenizer, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "dataset.json", "shard-00000", "shard-00001", "shard-00002",
    ]  # fmt: skip
    assert len(records) == TOTAL
    for record, study in zip(records, studies(0), strict=True):
        assert (record["id"], record["report"], record["split"]) == (study.id, study.report, "train")
        assert record["modality"] == "xray"
        wanted = tokenizer.encode(prepare_image(study.images[0].pixels, 96, gray=True))
        assert record["codes"] == wanted.flatten().tolist()
    assert list(prepare.load(tmp_path, tokenizer)) == records


def test_a_killed_run_goes_on_after_its_whole_shards(
    tokenizer: VQTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make(tokenizer, tmp_path / "whole")
    out = tmp_path / "killed"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)  # the first shard is written aside, but not yet whole
        make(tokenizer, out)
    assert not (out / "shard-00000").exists()
    assert make(tokenizer, out) == whole

    shutil.rmtree(out / "shard-00001")
    (out / ".shard-00001").mkdir()  # as a kill leaves it
    (out / ".shard-00001" / "torn.arrow").write_bytes(b"half")
    kept = {name: (out / name).stat().st_mtime_ns for name in ("shard-00000", "shard-00002")}
    encoded: list[int] = []
    real = VQTokenizer.encode

    def watched(self: VQTokenizer, images: list[object]) -> torch.Tensor:
        encoded.append(len(images))
        return real(self, images)  # type: ignore[arg-type]

    monkeypatch.setattr(VQTokenizer, "encode", watched)
    assert make(tokenizer, out) == whole
    assert encoded == [4]  # only what was missing
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert not (out / ".shard-00001").exists()
    assert make(tokenizer, out) == whole and encoded == [4]


def test_another_tokenizer_or_another_size_is_refused(tokenizer: VQTokenizer, tmp_path: Path) -> None:
    make(tokenizer, tmp_path)
    other = VQTokenizer(tokenizer.config).eval()
    assert prepare.codebook_hash(other) != prepare.codebook_hash(tokenizer)
    for attempt in (lambda: make(other, tmp_path), lambda: prepare.load(tmp_path, other)):
        with pytest.raises(UserError, match="image_tokenizer=") as told:
            attempt()
        assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)
    with pytest.raises(UserError, match=r"studies=10, wanted 12"):
        make(tokenizer, tmp_path, total=12)


def test_nothing_prepared(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared dataset there; make one with `medim prepare"):
        prepare.load(tmp_path)
