"""PathGen on a miniature: its table in four formats, tiles as files, tiles cut from a slide."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import PIL.Image
import pyarrow
import pyarrow.parquet
import pytest

from medim.data.sources.base import split_of
from medim.data.sources.pathgen import PathGenOptions, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError
from medim.pictures.slide import Region

SLIDE = "TCGA-AA-3844-01Z-00-DX1.bf88ce1f-0601-40c8-813e-4e3df51bd2f0"
OTHER = "TCGA-22-5474-01Z-00-DX1.8736FB24-7E65-4ACB-9325-382D7F864F62"
ROWS = [
    {"wsi_id": SLIDE, "position": ["16", "32"], "caption": "Glands, “crowded”.", "file_id": "bffacf34"},
    {"wsi_id": OTHER, "position": ["0", "64"], "caption": "Stroma.", "file_id": "11111111"},
    {"wsi_id": OTHER, "position": ["64", "64"], "caption": "Nests.", "file_id": "11111111"},
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One slide as gdc-client unpacks it, and a tile of each naming."""
    (tmp_path / "bffacf34").mkdir()
    (tmp_path / "bffacf34" / f"{SLIDE}.svs").write_bytes(b"opened only when pixels are wanted")
    PIL.Image.new("RGB", (40, 40), "pink").save(tmp_path / f"{OTHER}_0_64.png")
    (tmp_path / OTHER).mkdir()
    PIL.Image.new("RGB", (40, 40), "pink").save(tmp_path / OTHER / "64_64.jpg")
    return tmp_path


def put(root: Path, ending: str, rows: list[dict]) -> None:
    table = root / f"PathGen{ending}"
    if ending == ".json":
        table.write_bytes(b"\xef\xbb\xbf" + json.dumps(rows, indent=1, ensure_ascii=False).encode())
    elif ending == ".jsonl":
        table.write_text("\n".join(map(json.dumps, rows)))
    elif ending == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), table)
    else:
        with table.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".parquet"])
def test_slides_and_tiles(root: Path, ending: str) -> None:
    put(root, ending, ROWS)
    cut, flat, nested = read(root, PathGenOptions(side=96))
    assert isinstance(cut, Study) and isinstance(flat, Study) and isinstance(nested, Study)
    assert (cut.id, cut.patient_id, cut.report) == (f"{SLIDE}_16_32", "TCGA-AA-3844", "Glands, “crowded”.")
    assert cut.images[0].pixels == Region(root / "bffacf34" / f"{SLIDE}.svs", 16, 32, 96)
    assert flat.images[0].pixels == root / f"{OTHER}_0_64.png" and flat.images[0].modality == "pathology"
    assert nested.images[0].pixels == root / OTHER / "64_64.jpg" and nested.id == f"{OTHER}_64_64"
    assert flat.split == nested.split == split_of("TCGA-22-5474", 0.05, 0.05)


def test_folders_of_their_own_and_older_names(root: Path, tmp_path: Path) -> None:
    old = [{"WSI_id": "Slide 1", "x": 5, "y": 6, "caption": "Cells."}]
    put(root, ".csv", old)
    folder = tmp_path / "elsewhere" / "deep"
    folder.mkdir(parents=True)
    (folder / "slide 1.TIF").write_bytes(b"")
    (one,) = read(root, PathGenOptions(slides=str(tmp_path / "elsewhere"), table=str(root / "PathGen.csv")))
    assert isinstance(one, Study) and one.patient_id == "Slide 1"
    assert one.images[0].pixels == Region(folder / "slide 1.TIF", 5, 6, 672)


def test_bad_rows_are_named(root: Path) -> None:
    (root / "PathGen.json").write_text(
        json.dumps([*ROWS, ROWS[0], {**ROWS[0], "position": ["1"]}, {**ROWS[0], "position": [7, 7], "caption": " "}, 3,
                    {**ROWS[0], "wsi_id": "gone"}])
    )  # fmt: skip
    skipped = [s for s in read(root, PathGenOptions()) if isinstance(s, Skipped)]
    assert [(s.id, s.reason) for s in skipped] == [
        (f"{SLIDE}_16_32", "a study of this id came before"),
        ("row 5", "no slide or no position in its row"),
        (f"{SLIDE}_7_7", "the caption is empty"),
        ("row 7", "not a JSON object"),
        ("gone_16_32", "neither its tile nor its slide is there"),
    ]


def test_mistakes(root: Path) -> None:
    with pytest.raises(UserError, match=r"holds none; name the table of captions: --table FILE"):
        list(read(root, PathGenOptions()))
    put(root, ".csv", [{"slide": "a", "caption": "b"}])
    with pytest.raises(UserError, match=r"no column 'wsi_id'; there are slide, caption"):
        list(read(root, PathGenOptions()))
    put(root, ".json", ROWS)
    with pytest.raises(UserError, match=r"holds PathGen\.csv, PathGen\.json; name the table"):
        list(read(root, PathGenOptions()))
    table = root / "PathGen.json"
    table.write_bytes(table.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"PathGen\.json: no JSON from here on"):
        list(read(root, PathGenOptions(table=str(table))))
    with pytest.raises(UserError, match=r"--side 0: at least one pixel"):
        list(read(root, PathGenOptions(side=0)))
    with pytest.raises(UserError, match=r"--tiles .*nowhere: no such folder"):
        list(read(root, PathGenOptions(table=str(table), tiles=str(root / "nowhere"))))
    with pytest.raises(UserError, match=r"no such folder"):
        list(read(root / "nowhere", PathGenOptions()))
