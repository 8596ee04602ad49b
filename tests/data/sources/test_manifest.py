"""Tables of studies: three formats with the same content, columns of any name, and all that can be wrong in a row."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from medim.data.sources.base import split_of
from medim.data.sources.manifest import ManifestOptions, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"id": "a", "image": "x y/ä.png", "report": "Heart, normal.\nClear.", "modality": "xray", "view": "PA",
     "patient": "p1", "split": "val"},
    {"id": "b", "image": "f.png|l.png", "report": "", "modality": "mri", "view": "t1|t2", "patient": "p2", "split": ""},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8-sig")
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "tsv", "parquet"])
def test_formats(ending: str, tmp_path: Path) -> None:
    first, second = read(write(tmp_path / f"t.{ending}", ROWS), ManifestOptions())
    assert isinstance(first, Study) and isinstance(second, Study)
    assert (first.id, first.patient_id, first.split, first.source) == ("a", "p1", "validation", "manifest")
    assert first.report == "Heart, normal.\nClear."
    assert [(i.modality, i.pixels, i.view) for i in first.images] == [("xray", tmp_path / "x y" / "ä.png", "PA")]
    assert [(i.pixels, i.view) for i in second.images] == [(tmp_path / "f.png", "t1"), (tmp_path / "l.png", "t2")]
    assert second.split == split_of("p2")


def test_columns_of_other_names(tmp_path: Path) -> None:
    rows = [{"study": "a", "frontal": "f.png", "lateral": "l.png", "text": "Clear."}]
    table = write(tmp_path / "t.csv", rows)
    columns = {"id": "study", "image": "frontal+lateral", "report": "text"}
    (study,) = read(table, ManifestOptions(columns=columns, modality="xray", images=str(tmp_path / "pictures")))
    assert isinstance(study, Study) and (study.id, study.patient_id, study.report) == ("a", "a", "Clear.")
    assert [image.pixels for image in study.images] == [tmp_path / "pictures" / n for n in ("f.png", "l.png")]
    for choice, words in (
        (
            ManifestOptions(columns=columns),
            "no column 'modality' for modality; there are study, frontal, lateral, text",
        ),
        (ManifestOptions(modality="xray"), "no column 'image' for image"),
        (ManifestOptions(columns=columns | {"patient": "who"}, modality="xray"), "no column 'who' for patient"),
        (ManifestOptions(columns={"pateint": "x"}), "pateint=...: known are id, image"),
        (ManifestOptions(modality="xrays"), "--modality xrays: one of"),
    ):
        with pytest.raises(UserError) as told:
            list(read(table, choice))
        assert words in str(told.value) and "\n" not in str(told.value)


def test_rows_that_are_wrong(tmp_path: Path) -> None:
    good = {"id": "a", "image": "a.png", "report": "Clear.", "modality": "xray"}
    lines = [
        json.dumps(good), '{"id": "b", ', "[1]", json.dumps(good), json.dumps(good | {"id": "c", "image": None}),
        json.dumps(good | {"id": "d", "modality": "pet"}), json.dumps(good | {"id": "e", "view": ["PA", "AP"]}),
        json.dumps(good | {"id": "f", "split": "dev"}), json.dumps({"image": "g/h.png", "modality": "ct"}),
    ]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("\r\n".join(lines))
    found = list(read(tmp_path / "t.jsonl", ManifestOptions()))
    assert [one.id for one in found if isinstance(one, Study)] == ["a", "g/h"]
    reasons = [(one.id, one.reason) for one in found if isinstance(one, Skipped)]
    assert [id for id, _ in reasons] == ["row 2", "row 3", "a", "c", "d", "e", "f"]
    words = ("not JSON", "not a JSON object", "came before", "no image", "modality 'pet'", "1 images but 2", "'dev'")
    for (_, reason), word in zip(reasons, words, strict=True):
        assert word in reason


def test_what_is_no_table(tmp_path: Path) -> None:
    (tmp_path / "t.parquet").write_bytes(b"no parquet")
    (tmp_path / "t.xls").write_bytes(b"")
    for name, words in (("t.parquet", "no Parquet file"), ("t.xls", "give a table"), ("absent.csv", "give a table")):
        with pytest.raises(UserError, match=words):
            list(read(tmp_path / name, ManifestOptions()))
