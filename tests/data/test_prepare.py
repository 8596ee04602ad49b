"""Tokenised datasets: exact codes, shards that survive a kill to the byte, no mixing of tokenizers."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from medim.data import phantom, prepare
from medim.data.prepare import Encoding
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.tokenization.image import VQConfig, VQTokenizer, prepare_image
from medim.tokenization.text import TextTokenizer

ROOT = Path(__file__).parents[2]
TOTAL = 10


def phantoms() -> Iterator[Callable[[], Study]]:
    return (lambda index=index: phantom.study(0, index) for index in range(TOTAL))  # type: ignore[misc]


@pytest.fixture(scope="module")
def how() -> Encoding:
    torch.manual_seed(0)
    made = VQTokenizer(VQConfig(resolution=96, ch_mult=(1, 1), z_channels=8, embed_dim=4, n_embed=16, patch=8)).eval()
    with torch.no_grad():
        made.quantize.embedding.weight.normal_(std=0.3)
    text = TextTokenizer.from_pretrained(ROOT / "tokenizers" / "demo-bpe")
    return Encoding(made, text, shard_size=4, batch_size=3)


def make(how: Encoding, out: Path, found: Callable[[], Any] = phantoms, **more: Any) -> dict[str, Any]:
    return prepare.prepare(found, how, out, source="test", **more)


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_rows_are_the_studies(how: Encoding, tmp_path: Path) -> None:
    index = make(how, tmp_path)
    rows = list(prepare.load(tmp_path, how.tokenizer))
    assert len(rows) == TOTAL and index["shards"] == 3
    for row, study in zip(rows, (one() for one in phantoms()), strict=True):
        for name in ("id", "patient_id", "report", "split", "source", "prompt"):
            assert row[name] == getattr(study, name)
        assert row["report_ids"] == how.text.encode(study.report)
        (image,), (original,) = row["images"], study.images
        assert (image["modality"], image["view"]) == ("xray", original.view)
        prepared = prepare_image(original.pixels, 96, gray=True)
        assert image["codes"] == how.tokenizer.encode(prepared).flatten().tolist()
        with PIL.Image.open(io.BytesIO(image["preview"])) as preview:  # fewer than are kept: every one has its picture
            assert preview.mode == "L" and np.array_equal(np.asarray(preview), np.asarray(prepared.convert("L")))


def test_a_source_that_cannot_be_read_is_said_once(
    how: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Studies are counted in a thread beside, which has met it too."""
    thrown: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", thrown.append)

    def found() -> Iterator[Study]:
        raise UserError("atlas none.nii.gz: no such file")
        yield

    with pytest.raises(UserError, match="no such file"):
        prepare.prepare(found, how, tmp_path / "out", source="nifti", options={})
    for thread in threading.enumerate():
        if thread.name.endswith("(_count)"):
            thread.join()
    assert not thrown


def test_the_index_counts(how: Encoding, tmp_path: Path) -> None:
    def found() -> Iterator[Study | Skipped]:
        gray = PIL.Image.fromarray(np.arange(100 * 100, dtype=np.uint32).reshape(100, 100).astype(np.uint8))
        for n, (split, view) in enumerate([("train", "PA"), ("train", "PA"), ("test", "AP"), ("train", "")]):
            yield Study(f"s{n}", f"p{n // 2}", (Image("xray", gray, view),), "Heart is normal.", split=split)
        yield Skipped("s9", "a/b.png", "no report beside it")
        yield Study("s10", "p0", (), "Only text.")
        yield Study("s13", "p0", (), " ")
        yield Study("s11", "p0", (Image("mri", gray, "t1"), Image("mri", gray, "t2")), "")
        yield Study("s12", "p0", (Image("xray", gray),), " ")

    index = make(how, tmp_path, found)
    words = len(how.text.encode("Heart is normal."))
    alone = len(how.text.encode("Only text."))
    assert index["studies"] == 6 and index["patients"] == 2
    assert index["splits"] == {"test": 1, "train": 5}
    assert index["images"]["train"] == {"mri": {"t1": 1, "t2": 1}, "xray": {"": 1, "PA": 2}}
    assert index["report_tokens"] == {"test": {str(words): 1}, "train": {"0": 1, str(words): 3, str(alone): 1}}
    assert [(one["id"], one["reason"]) for one in index["skipped"]] == [
        ("s9", "no report beside it"),
        ("s13", "neither an image nor a report"),
        ("s12", "no report, and fewer than two images (--reports.empty keep takes it)"),
    ]
    assert json.loads((tmp_path / "index.json").read_text()) == index
    assert [row["id"] for row in prepare.load(tmp_path, split="test")] == ["s2"]
    with pytest.raises(UserError, match="no study of the split 'validation'; there are test, train"):
        prepare.load(tmp_path, split="validation")


def test_an_empty_report_can_be_kept(how: Encoding, tmp_path: Path) -> None:
    def found() -> Iterator[Study]:
        yield replace(phantom.study(0, 0), report=" \n")

    kept = replace(how, reports=replace(how.reports, empty="keep"))
    assert make(kept, tmp_path, found)["studies"] == 1
    assert prepare.load(tmp_path)[0]["report"] == "" and prepare.load(tmp_path)[0]["report_ids"] == []


def test_previews_are_a_sample(how: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the smallest hashes of ids, whatever the order of listing."""
    monkeypatch.setattr(prepare, "PREVIEWS", 2)
    make(how, tmp_path)
    ids = [study().id for study in phantoms()]
    for first in range(0, TOTAL, how.shard_size):
        shard = ids[first : first + how.shard_size]
        wanted = set(sorted(shard, key=lambda one: hashlib.sha256(one.encode()).digest())[:2])
        rows = [row for row in prepare.load(tmp_path) if row["id"] in shard]
        assert {row["id"] for row in rows if row["images"][0]["preview"]} == wanted


def test_bytes_do_not_depend_on_kills_threads_or_who_writes(how: Encoding, tmp_path: Path) -> None:
    make(how, tmp_path / "whole")
    whole = files(tmp_path / "whole")
    assert set(whole) > {"index.json", "prepare.json", "shard-00000.arrow", "shard-00002.json"}
    make(replace(how, workers=3), tmp_path / "threads")
    assert files(tmp_path / "threads") == whole

    assert make(replace(how, part=(1, 2)), tmp_path / "parts") == {}
    with pytest.raises(UserError, match="not finished: run the command that made it again"):
        prepare.load(tmp_path / "parts")
    assert make(replace(how, part=(0, 2)), tmp_path / "parts")
    assert files(tmp_path / "parts") == whole


@pytest.mark.parametrize("kept", [0, 1, 2, 5, 7])
def test_a_killed_run_goes_on_after_its_whole_shards(
    kept: int, how: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at its `kept`-th file: what is renamed stays, what is aside is of no account."""
    make(how, tmp_path / "whole")
    out, left = tmp_path / "killed", kept

    def killed(aside: Any, path: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            Path(out / ".torn.123.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        rename(aside, path)

    rename = os.replace
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare.os, "replace", killed)
        make(how, out)
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("shard-*.arrow")}
    encoded: list[int] = []
    real = VQTokenizer.encode

    def watched(self: VQTokenizer, images: Any) -> torch.Tensor:
        encoded.append(len(images))
        return real(self, images)

    monkeypatch.setattr(VQTokenizer, "encode", watched)
    make(how, out)
    assert sum(encoded) == TOTAL - how.shard_size * len(before)
    assert files(out) == files(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before
    make(how, out)
    assert sum(encoded) == TOTAL - how.shard_size * len(before)  # a finished dataset is left alone


def test_broken_files_are_named_and_limited(how: Encoding, tmp_path: Path) -> None:
    good, cut, tiny = (tmp_path / name for name in ("good ü.jpg", "cut.jpg", "tiny.png"))
    PIL.Image.effect_noise((120, 100), 50).save(good)
    cut.write_bytes(good.read_bytes()[:900])
    PIL.Image.new("L", (1, 1)).save(tiny)

    def found() -> Iterator[Study]:
        for n, file in enumerate([good, cut, good, tiny, tmp_path / "absent.png"]):
            yield Study(f"s{n}", "p", (Image("xray", file),), "Clear.")
        yield Study("s5", "p", (Image("xray", cut), Image("xray", good)), "Clear.")
        yield Study("s6", "p", (Image("petscan", good),), "Clear.")

    index = make(replace(how, max_broken=100.0), tmp_path / "a", found)
    assert [row["id"] for row in prepare.load(tmp_path / "a")] == ["s0", "s2", "s5"]
    assert [(s["id"], s["file"]) for s in index["skipped"]] == [
        ("s1", "cut.jpg"), ("s3", "tiny.png"), ("s4", "absent.png"), ("s5", "cut.jpg"), ("s6", "good ü.jpg"),
    ]  # fmt: skip
    for n, words in enumerate(("cut.jpg", "1x1", "absent.png", "cut.jpg", "petscan")):
        assert words in index["skipped"][n]["reason"] and "\n" not in index["skipped"][n]["reason"]
    (row,) = (row for row in prepare.load(tmp_path / "a") if row["id"] == "s0")
    assert row["images"][0]["sha256"] == hashlib.sha256(good.read_bytes()).hexdigest()

    with pytest.raises(UserError, match=r"5 of 7 studies could not be read, above --max-broken 50 percent; first s1"):
        make(replace(how, max_broken=50.0), tmp_path / "b", found)
    assert not (tmp_path / "b" / "index.json").exists() and (tmp_path / "b" / "shard-00001.arrow").exists()
    assert make(replace(how, max_broken=100.0), tmp_path / "b", found)["studies"] == 3  # nothing was lost


def test_nothing_to_write(how: Encoding, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study found there"):
        make(how, tmp_path / "a", lambda: iter(()))
    with pytest.raises(UserError, match="none of 1 studies can be used: neither an image"):
        make(how, tmp_path / "b", lambda: iter([Study("s", "p", (), "")]))


def test_a_full_disk(how: Encoding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = 0

    def full(_: int) -> None:
        nonlocal written
        written += 1
        if written == 4:  # prepare.json, then both files of the first shard
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="the disk is full; finished shards are kept"):
        patch.setattr(prepare.os, "fsync", full)
        make(how, tmp_path / "a")
    assert (tmp_path / "a" / "shard-00000.arrow").is_file() and not list((tmp_path / "a").glob(".shard*"))
    make(how, tmp_path / "a")
    make(how, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_belongs_to_something_else_is_refused(how: Encoding, tmp_path: Path) -> None:
    make(how, tmp_path)
    other = VQTokenizer(how.tokenizer.config).eval()
    padded = VQTokenizer(replace(how.tokenizer.config, fit="pad")).eval()
    padded.load_state_dict(how.tokenizer.state_dict())
    assert len({prepare.codebook_hash(one) for one in (other, padded, how.tokenizer)}) == 3
    for attempt, words in (
        (lambda: make(replace(how, tokenizer=other), tmp_path), "image_tokenizer="),
        (lambda: prepare.load(tmp_path, padded), "image_tokenizer="),
        (lambda: make(how, tmp_path, options={"views": ["PA"]}), "options="),
        (lambda: make(replace(how, shard_size=5), tmp_path), "shard_size=4, wanted 5"),
    ):
        with pytest.raises(UserError, match=words) as told:
            attempt()
        assert str(tmp_path) in str(told.value) and "\n" not in str(told.value)


def test_a_damaged_folder(how: Encoding, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no prepared dataset there; make one with `medim prepare"):
        prepare.load(tmp_path)
    make(how, tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "index.json").write_text(json.dumps(index | {"format": 0}))
    with pytest.raises(UserError, match="dataset format 0, this version reads 1"):
        prepare.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index | {"studies": 11}))
    with pytest.raises(UserError, match="holds 10 of 11 studies"):
        prepare.load(tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(index))
    (tmp_path / "shard-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"shard-00001\.arrow is missing; remove index.json"):
        prepare.load(tmp_path)


def test_two_processes_at_once(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "medim", "prepare", "demo", "--studies", "12", "--shard-size", "4", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    alone = subprocess.run(
        [*command, str(tmp_path / "one")], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    assert b"12 studies (12 train), 0 skipped" in alone.stdout
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]  # as accelerate and torchrun say it
    running = [
        subprocess.Popen([*command, str(tmp_path / "two")], cwd=ROOT, env=environment | rank, stderr=subprocess.DEVNULL)
        for rank in ranks
    ]
    assert [process.wait() for process in running] == [0, 0]
    names = files(tmp_path / "one")
    assert filecmp.cmpfiles(tmp_path / "one", tmp_path / "two", names, shallow=False) == (list(names), [], [])
    assert files(tmp_path / "two").keys() == names.keys()
