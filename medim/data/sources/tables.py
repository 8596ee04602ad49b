"""Tables as streams of rows: JSON, JSON lines, CSV and Parquet, of any length in constant memory."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from medim.errors import UserError

TABLES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BATCH = 1024  # rows of a Parquet file in memory


def rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """The rows in order; one that is none is what is wrong with it, in one line. A .json file may hold a list.

    Raises:
        UserError: no such file, another ending, not the format of its ending.
        ImportError: a list in a .json file needs a package; the text holds the pip line.
    """
    ending = path.suffix.lower()
    if not path.is_file() or ending not in TABLES:
        raise UserError(f"{path}: give a table, .jsonl, .json, .csv, .tsv or .parquet")
    if ending == ".parquet":
        yield from _parquet(path)
    elif ending == ".json" and _starts_with(path, b"["):
        yield from _list(path)
    else:
        with path.open(encoding="utf-8-sig", newline="", errors="replace") as lines:
            if ending in (".csv", ".tsv"):
                yield from csv.DictReader(lines, delimiter="\t" if ending == ".tsv" else ",")
                return
            for line in lines:
                if line.strip():
                    yield _object(line)


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(BATCH):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise UserError(f"{path}: no Parquet file ({' '.join(str(error).split())})") from None


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(mark)


def _list(path: Path) -> Iterator[dict[str, Any] | str]:
    try:
        import ijson
    except ImportError as error:
        raise ImportError("a list in a .json file needs ijson: pip install 'medim[data]'") from error
    with path.open("rb") as file:
        if file.read(3) != b"\xef\xbb\xbf":
            file.seek(0)
        try:
            for value in ijson.items(file, "item", use_float=True):
                yield value if isinstance(value, dict) else "not a JSON object"
        except ijson.JSONError as error:
            raise UserError(f"{path}: no JSON from here on ({' '.join(str(error).split())})") from None


def _object(line: str) -> dict[str, Any] | str:
    try:
        value = json.loads(line)
    except ValueError as error:
        return f"not JSON ({error})"
    return value if isinstance(value, dict) else "not a JSON object"
