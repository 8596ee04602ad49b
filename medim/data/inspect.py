"""What is in a prepared dataset: counts, lengths, use of the codebook, and what stands there twice.

One pass over the shards keeps some 80 bytes of each study and image; a second one reads the few rows that are named or
shown. Shape letters: S studies, I images, K codes of the codebook, F bytes of a fingerprint.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
from jaxtyping import Bool, Int, UInt8, UInt64
from numpy import ndarray

from medim.data.duplicates import RADIUS, duplicates
from medim.data.prepare import FORMAT
from medim.errors import UserError

COLUMNS = ("id", "patient_id", "source", "split", "prompt", "report", "report_ids", "images")
EXAMPLES = 5  # groups of repeats that are named, and reasons' files
NAMED = 4  # studies of such a group
SHOWN = 300  # letters of a repeated report
SPLITS = ("train", "validation", "test")  # come first, and in this order
UNKNOWN = np.uint64(0)  # the digest of an empty name


@dataclass(frozen=True)
class Prepared:
    """The folder that `medim prepare` wrote: its index and its shards, read batch by batch."""

    folder: Path
    index: dict[str, Any]
    shards: tuple[Path, ...]

    @classmethod
    def open(cls, folder: str | Path) -> Prepared:
        """Read the index, and check that the shards are those it counts.

        Raises:
            UserError: no index, one of another format, or shards missing.
        """
        folder = Path(folder)
        file = folder / "index.json"
        if not file.is_file():
            raise UserError(
                f"{folder}: no index.json there, so no whole dataset; run `medim prepare SOURCE ROOT --out {folder}` "
                "(again, if it was stopped)"
            )
        try:
            index = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{file}: damaged ({error}); remove it and run `medim prepare` again") from None
        if not isinstance(index, dict) or index.get("format") != FORMAT:
            said = index.get("format") if isinstance(index, dict) else None
            raise UserError(f"{file}: format {said!r}, this version reads {FORMAT}; prepare the dataset again")
        found = sorted(folder.glob("shard-*.arrow"))
        count = index.get("shards", len(found))
        for number in range(max(count, len(found))):
            if number >= count:
                raise UserError(f"{folder}: {found[-1].name} is not one of the {count} shards of index.json; remove it")
            if not (folder / f"shard-{number:05d}.arrow").is_file():
                raise UserError(f"{folder}: shard-{number:05d}.arrow is missing; remove index.json and prepare again")
        return cls(folder, index, tuple(found))

    def batches(self) -> Iterator[pa.RecordBatch]:
        """All rows in order, a record batch at a time.

        Raises:
            UserError: a shard is damaged, or they hold more or fewer studies than the index counts.
        """
        rows = 0
        for shard in self.shards:
            try:
                with pa.memory_map(str(shard)) as file, pa.ipc.open_stream(file) as reader:
                    lacking = [name for name in COLUMNS if name not in reader.schema.names]
                    if lacking:
                        raise UserError(f"{shard}: no column {lacking[0]!r}; remove the shard and prepare again")
                    for batch in reader:
                        rows += batch.num_rows
                        yield batch
            except (pa.ArrowException, OSError) as error:
                said = " ".join(str(error).split())[:120]
                raise UserError(f"{shard}: damaged ({said}); remove it and index.json, and prepare again") from None
        if rows != self.index["studies"]:
            raise UserError(
                f"{self.folder}: the shards hold {rows} studies, index.json counts {self.index['studies']}; "
                "remove index.json and prepare again"
            )

    def rows(self, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Some rows by their number."""
        wanted = np.unique(np.fromiter(numbers, dtype=np.int64))
        found: dict[int, dict[str, Any]] = {}
        start = 0
        for batch in self.batches():
            low, high = np.searchsorted(wanted, (start, start + batch.num_rows))
            for number in wanted[low:high].tolist():
                found[number] = batch.slice(number - start, 1).to_pylist()[0]
            start += batch.num_rows
        return found


@dataclass(frozen=True)
class Columns:
    """What is kept of each study and of each image. Names are digests of 64 bits, `UNKNOWN` if they are empty.

    Attributes:
        splits: names of the splits; `split` holds their numbers.
        tokens: length of the report.
        previewed: whether a picture of the study is kept in the dataset.
        study: the row that an image belongs to.
        images: how many there are by (split, modality, view).
        codes: by modality, how often each code occurs, [K].
    """

    splits: tuple[str, ...]
    split: UInt8[ndarray, " S"]
    patient: UInt64[ndarray, " S"]
    report: UInt64[ndarray, " S"]
    tokens: Int[ndarray, " S"]
    previewed: Bool[ndarray, " S"]
    study: Int[ndarray, " I"]
    file: UInt64[ndarray, " I"]
    fingerprint: UInt8[ndarray, "I F"]
    images: Counter[tuple[str, str, str]]
    codes: dict[str, ndarray]


def gather(batches: Iterable[pa.RecordBatch], codebook_size: int) -> Columns:
    """One pass over the rows.

    Raises:
        UserError: a code outside the codebook, or a hash that is not hexadecimal.
    """
    splits: dict[str, int] = {}
    images: Counter[tuple[str, str, str]] = Counter()
    codes: dict[str, ndarray] = {}
    parts: dict[str, list[ndarray]] = {name: [] for name in Columns.__annotations__}
    start = 0
    for batch in batches:
        split = batch["split"].to_pylist()
        for name in split:
            splits.setdefault(name, len(splits))
        lengths = batch["images"].value_lengths().to_numpy(zero_copy_only=False)
        structs = batch["images"].flatten()
        flat = {field.name: structs.field(field.name) for field in structs.type}
        row = np.repeat(np.arange(batch.num_rows), lengths)
        modality = flat["modality"].to_pylist()
        images.update(zip((split[n] for n in row), modality, flat["view"].to_pylist(), strict=True))
        _count_codes(codes, modality, flat["codes"], codebook_size)
        preview = flat["preview"].fill_null(b"")
        shown = np.zeros(batch.num_rows, dtype=bool)
        shown[row[pa.compute.binary_length(preview).to_numpy(zero_copy_only=False) > 0]] = True
        own = zip(batch["source"].to_pylist(), batch["patient_id"].to_pylist(), strict=True)
        add = {
            "split": np.array([splits[name] for name in split], dtype=np.uint8),
            "patient": _digests(f"{source}\0{patient}" if patient else "" for source, patient in own),
            "report": _digests(batch["report"].to_pylist()),
            "tokens": batch["report_ids"].value_lengths().to_numpy(zero_copy_only=False).astype(np.int64),
            "previewed": shown,
            "study": row + start,
            "file": _from_hex(flat["sha256"].to_pylist(), "sha256")[:, :8].copy().view(np.uint64).ravel(),
            "fingerprint": _from_hex(flat["fingerprint"].to_pylist(), "fingerprint"),
        }
        for name, values in add.items():
            parts[name].append(values)
        start += batch.num_rows
    if not start:
        raise UserError("the dataset holds no studies; prepare it again from a source that has some")
    if len({part.shape[1] for part in parts["fingerprint"] if len(part)}) > 1:
        raise UserError("the fingerprints have more than one length; prepare the dataset again in one go")
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items() if arrays}
    return Columns(splits=tuple(splits), images=images, codes=codes, **joined)


def _count_codes(counts: dict[str, ndarray], modality: list[str], codes: pa.ListArray, size: int) -> None:
    """Add the codes of a batch to those of its modalities."""
    values = codes.flatten().to_numpy(zero_copy_only=False)
    if values.size and int(values.max()) >= size:
        raise UserError(
            f"code {int(values.max())} in a dataset whose image tokenizer has {size}: the folder's image_tokenizer is "
            "not the one that made it"
        )
    ends = np.cumsum(codes.value_lengths().to_numpy(zero_copy_only=False))
    names = np.array(modality)
    for name in dict.fromkeys(modality):
        own = values
        if (names != name).any():
            own = values[np.repeat(names == name, np.diff(ends, prepend=0))]
        counts[name] = counts.get(name, 0) + np.bincount(own, minlength=size)


def _digests(names: Iterable[str]) -> UInt64[ndarray, " S"]:
    raw = b"".join(hashlib.blake2b(n.encode(), digest_size=8).digest() if n else bytes(8) for n in names)
    return np.frombuffer(raw, dtype=np.uint64)


def _from_hex(values: list[str], name: str) -> UInt8[ndarray, "I F"]:
    if not values:
        return np.zeros((0, 32), dtype=np.uint8)
    try:
        raw = np.frombuffer(bytes.fromhex("".join(values)), dtype=np.uint8)
        if len({len(value) for value in values}) > 1 or len(values[0]) < 16:
            raise ValueError
    except ValueError:
        raise UserError(f"a {name} of the dataset is not hexadecimal; prepare the dataset again") from None
    return raw.reshape(len(values), -1)


# -------------------------------------------------------------------------------------------------------- repeats


@dataclass(frozen=True)
class Repeats:
    """What occurs in several studies: groups of rows, those across splits first, then the largest first.

    Attributes:
        studies: how many studies are in the groups.
        across_patients: groups that hold studies of two patients. `across_splits`: of two splits.
        examples: the rows of the first groups, in order, and whether they lie in two splits.
    """

    groups: int
    studies: int
    across_patients: int
    across_splits: int
    examples: tuple[tuple[tuple[int, ...], bool], ...]


def repeats(
    label: ndarray,
    study: Int[ndarray, " N"],
    columns: Columns,
    differ: ndarray | None = None,
    splits_only: bool = False,
) -> Repeats:
    """Groups of equal `label` that hold two studies or more.

    Args:
        study: the row of each label.
        differ: a second label; groups within which it is the same everywhere do not count.
        splits_only: groups within one split do not count.
    """
    if not label.size:
        return Repeats(0, 0, 0, 0, ())
    order = np.lexsort((study, label))
    label, study = label[order], study[order]
    fresh = np.r_[True, label[1:] != label[:-1]]
    starts = np.flatnonzero(fresh)

    def varies(values: ndarray) -> ndarray:
        return np.minimum.reduceat(values, starts) != np.maximum.reduceat(values, starts)

    new_study = fresh | np.r_[True, study[1:] != study[:-1]]
    sizes = np.add.reduceat(new_study.astype(np.int64), starts)
    splits, patients = varies(columns.split[study]), varies(columns.patient[study])
    chosen = sizes > 1
    if differ is not None:
        chosen &= varies(differ[order])
    if splits_only:
        chosen &= splits
    groups = np.flatnonzero(chosen)
    groups = groups[np.lexsort((-sizes[groups], ~splits[groups]))]
    ends = np.r_[starts[1:], len(label)]
    return Repeats(
        groups=len(groups),
        studies=int(sizes[groups].sum()),
        across_patients=int(patients[groups].sum()),
        across_splits=int(splits[groups].sum()),
        examples=tuple(
            (tuple(np.unique(study[starts[g] : ends[g]]).tolist()), bool(splits[g])) for g in groups[:EXAMPLES]
        ),
    )


# -------------------------------------------------------------------------------------------------------- summary


def summary(data: Prepared, columns: Columns, radius: int = RADIUS) -> dict[str, Any]:
    """All figures as plain JSON data: what ``inspect.json`` holds."""
    rows = np.arange(len(columns.split))
    same_file = np.unique(columns.file, return_inverse=True)[1]
    near = duplicates(columns.fingerprint, radius)
    alike = duplicates(columns.fingerprint, 0)
    exact = same_file * (int(alike.max(initial=0)) + 1) + alike  # slices of a volume share a file, not a fingerprint
    known = rows[columns.patient != UNKNOWN]
    written = rows[columns.report != UNKNOWN]
    found = {
        "shared_patients": repeats(columns.patient[known], known, columns, splits_only=True),
        "shared_files": repeats(same_file, columns.study, columns, splits_only=True),
        "same_picture": repeats(exact, columns.study, columns),
        "near_picture": repeats(near, columns.study, columns, differ=exact),
        "same_report": repeats(columns.report[written], written, columns),
    }
    named = data.rows(n for one in found.values() for members, _ in one.examples for n in _named(members, columns))
    index = data.index
    ranks = {name: k for k, name in enumerate(SPLITS)}
    splits = sorted(enumerate(columns.splits), key=lambda split: (ranks.get(split[1], len(ranks)), split[1]))
    return {
        "format": 1,
        "source": index.get("source", ""),
        "studies": len(rows),
        "patients": len(np.unique(columns.patient[known])),
        "studies_without_patient": len(rows) - len(known),
        "images": len(columns.study),
        "resolution": index.get("resolution"),
        "fit": index.get("fit"),
        "splits": {
            name: {
                "studies": int((columns.split == k).sum()),
                "patients": len(np.unique(columns.patient[known][columns.split[known] == k])),
                "images": int((columns.split[columns.study] == k).sum()),
            }
            for k, name in splits
        },
        "views": [
            {"split": split, "modality": modality, "view": view, "images": count}
            for (split, modality, view), count in sorted(columns.images.items())
        ],
        "report_tokens": {name: _lengths(columns.tokens[columns.split == k]) for k, name in splits},
        "codebook": {name: codebook_use(counts) for name, counts in sorted(columns.codes.items())},
        "radius": radius,
        **{name: _told(one, named, columns, with_report=name == "same_report") for name, one in found.items()},
        "skipped": reasons(index.get("skipped", [])),
    }


def codebook_use(counts: Int[ndarray, " K"]) -> dict[str, Any]:
    """Entropy H of the codes in bits, perplexity 2^H, how many occur, and their shares, largest first."""
    total = int(counts.sum())
    shares = np.sort(counts[counts > 0])[::-1] / max(total, 1)
    entropy = float(-(shares * np.log2(shares)).sum()) + 0.0
    return {
        "size": len(counts),
        "codes": total,
        "used": len(shares),
        "entropy": entropy,
        "perplexity": 2**entropy,
        "shares": [float(f"{share:.3g}") for share in shares],
    }


def _lengths(tokens: Int[ndarray, " S"]) -> dict[str, Any]:
    return {
        "mean": float(tokens.mean()),
        "median": float(np.median(tokens)),
        "p95": float(np.percentile(tokens, 95)),
        "longest": int(tokens.max()),
        "empty": int((tokens == 0).sum()),
        "lengths": {int(n): int(count) for n, count in zip(*np.unique(tokens, return_counts=True), strict=True)},
    }


def _named(members: tuple[int, ...], columns: Columns) -> list[int]:
    """The rows of a group that are named: the first of each split, then the first others."""
    firsts = {int(columns.split[n]): n for n in reversed(members)}
    return [*dict.fromkeys([*sorted(firsts.values()), *members])][:NAMED]


def _told(one: Repeats, rows: dict[int, dict[str, Any]], columns: Columns, with_report: bool) -> dict[str, Any]:
    examples = []
    for members, across in one.examples:
        named = [rows[n] for n in _named(members, columns)]
        example: dict[str, Any] = {
            "count": len(members),
            "across_splits": across,
            "studies": [{key: row[key] for key in ("id", "patient_id", "split")} for row in named],
        }
        if with_report:
            example["report"] = named[0]["report"][:SHOWN]
        examples.append(example)
    return {
        "groups": one.groups,
        "studies": one.studies,
        "across_patients": one.across_patients,
        "across_splits": one.across_splits,
        "examples": examples,
    }


def reasons(skipped: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Skipped files by reason, the most frequent first. Reasons that differ in names and numbers only are one."""
    groups: dict[str, list[dict[str, str]]] = {}
    for one in skipped:
        reason = one.get("reason", "")
        for name in filter(None, (one.get("file"), Path(one.get("file") or "").name, one.get("id"))):
            reason = reason.replace(name, "FILE")
        groups.setdefault(re.sub(r"\d+(\.\d+)?", "N", reason), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        {"reason": own[0].get("reason", "") if len(own) == 1 else reason, "count": len(own), "examples": own[:EXAMPLES]}
        for reason, own in ordered
    ]
