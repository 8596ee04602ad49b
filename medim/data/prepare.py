"""Studies -> tokenised dataset: images are encoded once and stored as integers, in shards that survive a kill.

A dataset is a folder: ``shard-00000.arrow`` and so on (Arrow streams of `FEATURES`), each with a ``.json`` of what was
skipped; copies of both tokenizers; ``prepare.json``, what it is made of; ``index.json``, counts, written when all are
there. Every file is written aside, flushed to the disk and renamed. The bytes of a shard depend on the studies, the
tokenizers and the options alone: not on how often the run was killed, nor on who else wrote.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import io
import itertools
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.compute
from datasets import Dataset, Features, List, Value, concatenate_datasets
from tqdm import tqdm

from medim.data.augment import Augmentation
from medim.data.duplicates import fingerprint
from medim.data.reports import ReportOptions, prepare_report
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.pictures import Picture, read_picture
from medim.tokenization.image import VQTokenizer, prepare_image
from medim.tokenization.text import TextTokenizer
from medim.vocabulary import MODALITIES

FORMAT = 1
PREVIEWS = 24  # studies of a shard whose prepared pictures are kept, to look at
ROWS = 256  # of a record batch: what reading has in memory
FEATURES = Features(
    {
        **{name: Value("string") for name in ("id", "patient_id", "source", "split", "prompt", "report")},
        "report_ids": List(Value("uint32")),
        "images": List(
            {
                **{name: Value("string") for name in ("modality", "view", "window", "sha256", "fingerprint")},
                "spacing": List(Value("float32")),
                "codes": List(Value("uint16")),
                "preview": Value("binary"),
            }
        ),
    }
)
AUGMENTED = "augmented"  # of an image, where there are several: codes of the picture taken otherwise, a list each

Found = Study | Skipped | Callable[[], Study]  # the last is called when the study is needed


@dataclass(frozen=True)
class Encoding:
    """How studies become integers, and how much at a time; the first four and `views` change what is written.

    Attributes:
        part: (i, n): this process writes the shards i, i + n, i + 2n, ...
        workers: threads that read and prepare pictures ahead of the encoder; 0: the encoder waits for each batch.
        views: codes of an image that are stored: of the picture as it is, and taken otherwise (`medim.data.augment`).
        max_broken: percent of the studies whose pictures cannot be read, above which the run stops.
    """

    tokenizer: VQTokenizer
    text: TextTokenizer
    reports: ReportOptions = field(default_factory=ReportOptions)
    shard_size: int = 5000
    batch_size: int = 32
    part: tuple[int, int] = (0, 1)
    workers: int = 0
    max_broken: float = 1.0
    views: int = 1

    @property
    def schema(self) -> pa.Schema:
        """Of a shard."""
        if self.views == 1:
            return FEATURES.arrow_schema
        image = {**FEATURES["images"].feature, AUGMENTED: List(List(Value("uint16")))}
        return Features({**FEATURES, "images": List(image)}).arrow_schema


def codebook_hash(tokenizer: VQTokenizer) -> str:
    """Names what codes depend on: the sha256 of the image tokenizer's weights, resolution and fit, 16 hex digits."""
    digest = hashlib.sha256(f"{tokenizer.config.resolution} {tokenizer.config.fit}".encode())
    for name, value in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def text_hash(text: TextTokenizer) -> str:
    """Names a text tokenizer: the sha256 of its vocabulary and rules, 16 hex digits."""
    rules = getattr(text.tokenizer, "backend_tokenizer", None)
    said = rules.to_str() if rules is not None else json.dumps(sorted(text.tokenizer.get_vocab().items()))
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def prepare(
    found: Callable[[], Iterable[Found]],
    how: Encoding,
    out: str | Path,
    *,
    source: str,
    options: dict[str, Any] | None = None,
    total: int | None = None,
) -> dict[str, Any]:
    """Encode what a source lists into shards under `out`; returns the index, or an empty dict while shards of other
    processes are missing.

    Args:
        found: called once, and a second time to count if `total` is None. Must list the same studies each time.
        source: name of the source; with `options` it says what the dataset is made of.

    Raises:
        UserError: `out` holds a dataset of other studies, tokenizers or options; too many broken files; nothing to
            write; the disk is full. What was finished before stays.
    """
    out = Path(out)
    _claim(out, how, source, options or {})
    index = out / "index.json"
    if index.is_file():
        return json.loads(index.read_text())
    bar = _Bar(total=total, desc="encoding", unit="study", mininterval=1, smoothing=0.05)
    if total is None:
        threading.Thread(target=_count, args=(found, bar), daemon=True).start()
    rest, shards = iter(found()), 0
    with ThreadPoolExecutor(max(1, how.workers)) as pool:
        for number in itertools.count():
            listed = list(itertools.islice(rest, how.shard_size))
            if not listed:
                break
            shards += 1
            done = (out / f"{_shard(number)}.arrow").is_file()
            if not done and number % how.part[1] == how.part[0]:
                _write_shard(listed, how, out, number, bar, pool)
                _check_broken(out, how.max_broken, final=False)
            else:
                bar.update(len(listed))
                bar.initial += len(listed)  # not of this run's pace
    bar.close()
    return _finish(out, how, source, options or {}, shards)


def _shard(number: int) -> str:
    return f"shard-{number:05d}"


class _Bar(tqdm):
    """Studies done, the time that is left, and images a second of this run."""

    images = 0

    def encoded(self, studies: int, images: int) -> None:
        """Count a batch."""
        self.images += images
        self.set_postfix_str(f"{self.images / max(1e-9, time.time() - self.start_t):.0f} images/s", refresh=False)
        self.update(studies)


def _count(found: Callable[[], Iterable[Found]], bar: tqdm) -> None:
    """Learn how many studies there are while the first are encoded; until then the bar has no end.

    What is wrong with the source is said by the thread that encodes.
    """
    with suppress(UserError, OSError):
        bar.total = sum(1 for _ in found())


def _claim(out: Path, how: Encoding, source: str, options: dict[str, Any]) -> None:
    """Say what the folder is made of, or check that it is made of the same."""
    wanted = {
        "format": FORMAT,
        "source": source,
        "options": options,
        "image_tokenizer": codebook_hash(how.tokenizer),
        "text_tokenizer": text_hash(how.text),
        "shard_size": how.shard_size,
        "views": how.views if how.views > 1 else None,
    }
    card = out / "prepare.json"
    if card.is_file():
        _check_card(json.loads(card.read_text()), wanted, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    if any(out.glob("shard-*")):
        raise UserError(f"{out}: holds shards but no prepare.json: give another folder or remove it")
    with _space(out):
        for name, save in (("image", how.tokenizer.save_pretrained), ("text", how.text.save_pretrained)):
            aside = out / f".{name}_tokenizer.{os.getpid()}.partial"
            save(aside)
            try:
                os.replace(aside, out / f"{name}_tokenizer")
            except OSError:
                if not (out / f"{name}_tokenizer").is_dir():
                    raise
                shutil.rmtree(aside)  # another process was first
        said = {key: value for key, value in wanted.items() if value is not None}
        _write(card, json.dumps(said, indent=1).encode())


def _check_card(found: dict[str, Any], wanted: dict[str, Any], out: Path) -> None:
    for key, value in wanted.items():
        if found.get(key) != value:
            raise UserError(
                f"{out}: holds a dataset with {key}={found.get(key)}, wanted {value}; give another folder or remove it"
            )


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it: written aside, flushed to the disk, renamed."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except FileNotFoundError:
        if not path.is_file():  # else another process has finished, and tidied up
            raise
    finally:
        aside.unlink(missing_ok=True)


class _space:
    """Turns the error of a full disk into one that says what is kept."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{self.out}: the disk is full; finished shards are kept: make room and run the command again"
            ) from error


# ------------------------------------------------------------------------------------------------------- one shard


def _write_shard(
    listed: Sequence[Found], how: Encoding, out: Path, number: int, bar: _Bar, pool: ThreadPoolExecutor
) -> None:
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    broken = 0
    previews: list[tuple[int, int]] = []  # a heap of (-hash, row): the rows of the smallest hashes
    for loaded in _loaded(listed, how, pool):
        rows_now = [one for one in loaded if isinstance(one, _Loaded)]
        for one in loaded:
            if isinstance(one, Skipped):
                skipped.append({"id": one.id, "file": one.file, "reason": one.reason})
                broken += isinstance(one, _Broken)
            elif one.broken:
                skipped += [{"id": b.id, "file": b.file, "reason": b.reason} for b in one.broken]
                broken += 1
        pictures = [picture for one in rows_now for picture in one.prepared]
        parts = [pictures[i : i + how.batch_size] for i in range(0, len(pictures), how.batch_size)]
        codes = itertools.chain.from_iterable(
            how.tokenizer.encode(part).cpu().numpy().astype(np.uint16) for part in parts
        )
        for one in rows_now:
            row = _row(one, [next(codes).ravel() for _ in one.prepared], how)
            _preview(previews, rows, row, one.prepared[:: how.views])
        bar.encoded(len(loaded), len(pictures))
    table = pa.Table.from_pylist(rows, schema=how.schema)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=ROWS)
    said = {"seen": len(listed), "studies": len(rows), "broken": broken, "skipped": skipped}
    with _space(out):
        _write(out / f"{_shard(number)}.json", json.dumps(said, indent=1, ensure_ascii=False).encode())
        _write(out / f"{_shard(number)}.arrow", sink.getvalue())


class _Broken(Skipped):
    """Skipped since its pictures could not be read."""


@dataclass(frozen=True)
class _Loaded:
    """A study whose pictures are read: those that could be, with what is known of them; `prepared` has all views of the
    first, then those of the second, and so on."""

    study: Study
    report: str
    images: list[tuple[Image, Picture, str]]  # and the hash of the file
    prepared: list[PIL.Image.Image]
    broken: list[Skipped]


def _loaded(listed: Sequence[Found], how: Encoding, pool: ThreadPoolExecutor) -> Iterator[list[_Loaded | Skipped]]:
    """Batches of studies with their pictures, in order; with workers, read ahead of the encoder."""
    batches = [listed[i : i + how.batch_size] for i in range(0, len(listed), how.batch_size)]
    load = partial(_load, how=how)
    if not how.workers:
        yield from ([load(one) for one in batch] for batch in batches)
        return
    ahead = -(-2 * how.workers // how.batch_size) + 1
    waiting: list[list[Any]] = []
    for batch in [*batches, *([[]] * ahead)]:
        waiting.append([pool.submit(load, one) for one in batch])
        if len(waiting) > ahead:
            yield [future.result() for future in waiting.pop(0)]


def _load(found: Found, how: Encoding) -> _Loaded | Skipped:
    study = found() if callable(found) else found
    if isinstance(study, Skipped):
        return study
    config = how.tokenizer.config
    images, prepared = [], []
    changes = [Augmentation.draw(_stream(study.id, view)) for view in range(1, how.views)]  # shared by its images
    broken: list[Skipped] = []
    for image in study.images:
        file = _file(image)
        try:
            if image.modality not in MODALITIES:
                raise UserError(f"unknown modality {image.modality!r}; one of {', '.join(MODALITIES)}")
            gray = MODALITIES[image.modality].gray
            picture = read_picture(image.pixels, "black" if gray else "white")
            taken = [picture.image, *(change(picture.image, image.modality, image.view) for change in changes)]
            prepared += [prepare_image(one, config.resolution, gray, config.fit) for one in taken]
            images.append((image, picture, _hash(image)))
        except (UserError, OSError) as error:
            name = file.name if file else ""
            reason = " ".join(str(error).split()).replace(str(file), name)  # the same wherever the archive lies
            broken.append(_Broken(study.id, name, reason))
    report = prepare_report(study.report, how.reports)
    if not images and (broken or not report):
        return broken[0] if broken else Skipped(study.id, "", "neither an image nor a report")
    if not images:
        return _Loaded(study, report, images, prepared, broken)
    if not report and len(images) < 2 and how.reports.empty == "skip":
        return Skipped(study.id, "", "no report, and fewer than two images (--reports.empty keep takes it)")
    return _Loaded(study, report, images, prepared, broken)


def _stream(name: str, view: int) -> np.random.Generator:
    """The random stream of a study's view, wherever the study stands."""
    digest = hashlib.sha256(f"view {view} {name}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _file(image: Image) -> Path | None:
    if isinstance(image.pixels, PIL.Image.Image):
        return None
    return image.pixels if isinstance(image.pixels, Path) else image.pixels.file


def _hash(image: Image) -> str:
    if isinstance(image.pixels, PIL.Image.Image):
        pixels = image.pixels
        return hashlib.sha256(f"{pixels.mode}{pixels.size}".encode() + pixels.tobytes()).hexdigest()
    file = _file(image)
    assert file is not None
    return _file_hash(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=64)  # a volume is asked for once a slice
def _file_hash(file: Path, _mtime: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _row(one: _Loaded, codes: Sequence[np.ndarray], how: Encoding) -> dict[str, Any]:
    study = one.study
    return {
        "id": study.id,
        "patient_id": study.patient_id,
        "source": study.source,
        "split": study.split,
        "prompt": study.prompt,
        "report": one.report,
        "report_ids": how.text.encode(one.report),
        "images": [
            {
                "modality": image.modality,
                "view": image.view,
                "window": picture.window,
                "sha256": sha256,
                "fingerprint": fingerprint(one.prepared[how.views * number]),
                "spacing": list(image.spacing or picture.spacing or ()),
                "codes": codes[how.views * number],
                "preview": b"",
            }
            | ({AUGMENTED: list(codes[how.views * number + 1 : how.views * (number + 1)])} if how.views > 1 else {})
            for number, (image, picture, sha256) in enumerate(one.images)
        ],
    }


def _preview(
    kept: list[tuple[int, int]], rows: list[dict[str, Any]], row: dict[str, Any], pictures: Sequence[PIL.Image.Image]
) -> None:
    """Append a row; if the hash of its id is among the `PREVIEWS` smallest of the shard, its pictures are kept."""
    rows.append(row)
    rank = int.from_bytes(hashlib.sha256(row["id"].encode()).digest()[:8], "big")
    if len(kept) == PREVIEWS and rank >= -kept[0][0]:
        return
    for image, picture in zip(row["images"], pictures, strict=True):
        png = io.BytesIO()
        gray = MODALITIES[image["modality"]].gray
        (picture.convert("L") if gray else picture).save(png, "png")
        image["preview"] = png.getvalue()
    if len(kept) == PREVIEWS:
        for image in rows[heapq.heappop(kept)[1]]["images"]:
            image["preview"] = b""
    heapq.heappush(kept, (-rank, len(rows) - 1))


# ------------------------------------------------------------------------------------------------------ all shards


def _told(out: Path) -> list[dict[str, Any]]:
    """What each finished shard says of itself, in order."""
    return [json.loads(path.with_suffix(".json").read_text()) for path in sorted(out.glob("shard-*.arrow"))]


def _check_broken(out: Path, limit: float, *, final: bool) -> None:
    told = _told(out)
    seen, broken = sum(one["seen"] for one in told), sum(one["broken"] for one in told)
    if seen and (final or seen >= 200) and 100 * broken / seen > limit:
        first = next(s for one in told if one["broken"] for s in one["skipped"])
        raise UserError(
            f"{broken} of {seen} studies could not be read, above --max-broken {limit:g} percent; first {first['id']}: "
            f"{first['reason']} (all of them: {out}/shard-*.json). Mend them, or allow more"
        )


def _finish(out: Path, how: Encoding, source: str, options: dict[str, Any], shards: int) -> dict[str, Any]:
    """Write the index, if all shards are there: the last of several processes does it."""
    if not shards:
        raise UserError(f"{source}: no study found there")
    if any(not (out / f"{_shard(n)}.arrow").is_file() for n in range(shards)):
        return {}
    _check_broken(out, how.max_broken, final=True)
    told = _told(out)
    if not any(one["studies"] for one in told):
        reasons = Counter(s["reason"] for one in told for s in one["skipped"]).most_common(1)
        raise UserError(f"{source}: none of {sum(one['seen'] for one in told)} studies can be used: {reasons[0][0]}")
    index = {
        "format": FORMAT,
        "source": source,
        "options": options,
        **_counts(_open(out, shards)),
        "shards": shards,
        "shard_size": how.shard_size,
        **({"views": how.views} if how.views > 1 else {}),
        "image_tokenizer": codebook_hash(how.tokenizer),
        "text_tokenizer": text_hash(how.text),
        "resolution": how.tokenizer.config.resolution,
        "fit": how.tokenizer.config.fit,
        "versions": {name: version(name) for name in ("medim", "torch", "datasets", "pillow")},
        "skipped": [s for one in told for s in one["skipped"]],
    }
    for left in out.glob(".*.partial"):  # of runs that were killed
        shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    with _space(out):
        _write(out / "index.json", json.dumps(index, indent=1, ensure_ascii=False).encode())
    return index


def _counts(data: Dataset) -> dict[str, Any]:
    splits: Counter[str] = Counter()
    images: dict[str, dict[str, Counter[str]]] = {}
    lengths: dict[str, Counter[int]] = {}
    patients: set[bytes] = set()
    for batch in data.data.table.select(["patient_id", "split", "report_ids", "images"]).to_batches():
        tokens = batch["report_ids"].value_lengths().to_pylist()
        flat = batch["images"].flatten()
        starts = [*batch["images"].offsets.to_pylist()]
        modality, view = flat.field("modality").to_pylist(), flat.field("view").to_pylist()
        for n, (patient, split) in enumerate(
            zip(batch["patient_id"].to_pylist(), batch["split"].to_pylist(), strict=True)
        ):
            splits[split] += 1
            patients.add(hashlib.sha256(patient.encode()).digest()[:12])
            lengths.setdefault(split, Counter())[tokens[n]] += 1
            for k in range(starts[n] - starts[0], starts[n + 1] - starts[0]):
                images.setdefault(split, {}).setdefault(modality[k], Counter())[view[k]] += 1
    return {
        "studies": len(data),
        "patients": len(patients),
        "splits": dict(sorted(splits.items())),
        "images": {s: {m: dict(sorted(v.items())) for m, v in sorted(of.items())} for s, of in sorted(images.items())},
        "report_tokens": {s: {str(n): c for n, c in sorted(of.items())} for s, of in sorted(lengths.items())},
    }


def _open(folder: Path, shards: int) -> Dataset:
    return concatenate_datasets([Dataset.from_file(str(folder / f"{_shard(n)}.arrow")) for n in range(shards)])


def read_index(folder: str | Path) -> dict[str, Any]:
    """What ``index.json`` says.

    Raises:
        UserError: nothing prepared there, not finished, of another format, or shards missing.
    """
    folder = Path(folder)
    if not (folder / "prepare.json").is_file():
        raise UserError(
            f"{folder}: no prepared dataset there; make one with `medim prepare SOURCE ROOT --out {folder}`"
        )
    if not (folder / "index.json").is_file():
        raise UserError(f"{folder}: not finished: run the command that made it again, it goes on where it stopped")
    index = json.loads((folder / "index.json").read_text())
    if index.get("format") != FORMAT:
        raise UserError(
            f"{folder}: dataset format {index.get('format')}, this version reads {FORMAT}: prepare it again"
        )
    missing = [n for n in range(index["shards"]) if not (folder / f"{_shard(n)}.arrow").is_file()]
    if missing:
        raise UserError(
            f"{folder}: {_shard(missing[0])}.arrow is missing; remove index.json and run the command that made it again"
        )
    return index


def load(folder: str | Path, tokenizer: VQTokenizer | None = None, split: str | None = None) -> Dataset:
    """Open a prepared dataset, memory-mapped; with `tokenizer`, check that the codes are its own.

    Raises:
        UserError: see `read_index`; codes of another tokenizer; no study of that split.
    """
    index = read_index(folder)
    if tokenizer is not None:
        side, own = index.get("resolution"), tokenizer.config.resolution
        if side not in (None, own):
            raise UserError(
                f"{folder}: was prepared at {side} pixels, here images have {own}: prepare it again with --resolution "
                f"{own}, or train with resolution={side}"
            )
        _check_card(index, {"image_tokenizer": codebook_hash(tokenizer)}, Path(folder))
    data = _open(Path(folder), index["shards"])
    if len(data) != index["studies"]:
        raise UserError(f"{folder}: holds {len(data)} of {index['studies']} studies: a shard is not the one indexed")
    if split is None or index["splits"] == {split: len(data)}:
        return data
    if split not in index["splits"]:
        raise UserError(f"{folder}: no study of the split {split!r}; there are {', '.join(index['splits'])}")
    chosen = pa.compute.equal(data.data.table["split"], split)
    return data.select(np.flatnonzero(chosen.to_numpy()))
