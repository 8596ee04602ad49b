"""PathGen-1.6M: a table of captions with places in TCGA slides, and the slides, or the tiles cut from them.

Source: Sun et al. 2407.00203; the table, the names of tiles and their side of 672 pixels are those of its repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from medim.config import options
from medim.data.sources.base import Source, check_shares, files_under, split_of, unique
from medim.data.sources.tables import TABLES, rows
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.pictures.slide import Region

TILES = ("{slide}_{x}_{y}.png", "{slide}_{x}_{y}.jpg", "{slide}/{x}_{y}.png", "{slide}/{x}_{y}.jpg")
SLIDES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs")
TCGA = re.compile(r"(TCGA-[^-]{2}-[^-]{4})-")  # project, site and participant


@options
class PathGenOptions:
    """Where the parts are, and how tiles are cut.

    Attributes:
        table: file with wsi_id, position and caption, if it is not the only table in ROOT.
        tiles: folder of tiles named SLIDE_X_Y.png or SLIDE/X_Y.png (or jpg), if it is not ROOT.
        slides: folder that holds the slides, however deep, if it is not ROOT. A tile that is there as a file is
            not cut.
        side: pixels of a tile that is cut, at full resolution.
        validation: share of the patients that is held out for it, by the hash of their names.
        test: likewise the share of the test split. The split of the MeDiM paper is not published.
    """

    table: str = ""
    tiles: str = ""
    slides: str = ""
    side: int = 672
    validation: float = 0.05
    test: float = 0.05


def read(root: Path, choice: PathGenOptions) -> Iterator[Study | Skipped]:
    """The rows of the table in order, those whose slide or tile is not there named.

    Raises:
        UserError: no table or several, a folder that is not there, a table without the columns.
    """
    check_shares(choice.validation, choice.test)
    if choice.side < 1:
        raise UserError(f"--side {choice.side}: at least one pixel")
    table = Path(choice.table) if choice.table else _table(root)
    tiles, whole = (Path(given) if given else root for given in (choice.tiles, choice.slides))
    for name, folder in (("tiles", tiles), ("slides", whole)):
        if not folder.is_dir():
            raise UserError(f"--{name} {folder}: no such folder")
    slides = {path.stem.lower(): path for path in files_under(whole) if path.suffix.lower() in SLIDES}
    return unique(_studies(table, tiles, slides, choice))


def _table(root: Path) -> Path:
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    found = sorted(path for path in root.iterdir() if path.suffix.lower() in TABLES and path.is_file())
    if len(found) != 1:
        there = ", ".join(path.name for path in found) or "none"
        raise UserError(
            f"{root}: holds {there}; name the table of captions: --table FILE (.json, .jsonl, .csv, .parquet)"
        )
    return found[0]


def _studies(table: Path, tiles: Path, slides: Mapping[str, Path], choice: PathGenOptions) -> Iterator[Study | Skipped]:
    for number, row in enumerate(rows(table), start=1):
        if isinstance(row, str):
            yield Skipped(f"row {number}", table.name, row)
            continue
        cells = {str(name).strip().lower(): value for name, value in row.items()}
        lacking = [name for name in ("wsi_id", "caption") if name not in cells]
        if number == 1 and lacking:
            raise UserError(f"{table}: no column {lacking[0]!r}; there are {', '.join(map(str, row))}")
        yield _study(number, cells, table, tiles, slides, choice)


def _study(
    number: int,
    cells: Mapping[str, Any],
    table: Path,
    tiles: Path,
    slides: Mapping[str, Path],
    choice: PathGenOptions,
) -> Study | Skipped:
    slide, caption = (str(cells.get(name) or "").strip() for name in ("wsi_id", "caption"))
    place = _place(cells)
    if not slide or place is None:
        return Skipped(f"row {number}", table.name, "no slide or no position in its row")
    x, y = place
    id = f"{slide}_{x}_{y}"
    if not caption:
        return Skipped(id, table.name, "the caption is empty")
    named = (tiles / name.format(slide=slide, x=x, y=y) for name in TILES)
    pixels: Path | Region | None = next((path for path in named if path.is_file()), None)
    if pixels is None and (whole := slides.get(slide.lower())) is not None:
        pixels = Region(whole, x, y, choice.side)
    if pixels is None:
        return Skipped(id, table.name, "neither its tile nor its slide is there")
    barcode = TCGA.match(slide)
    patient = barcode[1] if barcode else slide
    split = split_of(patient, choice.validation, choice.test)
    return Study(id, patient, (Image("pathology", pixels),), caption, split=split, source="pathgen")


def _place(cells: Mapping[str, Any]) -> tuple[int, int] | None:
    """Column and row: a pair, a pair as text, or columns x and y."""
    given = cells.get("position", [cells.get("x"), cells.get("y")])
    digits = re.findall(r"\d+", str(given))
    return (int(digits[0]), int(digits[1])) if len(digits) == 2 else None


SOURCE = Source(
    read,
    PathGenOptions,
    "PathGen-1.6M: captions, and tiles or whole slides",
    "ROOT/PathGen-1.6M.json, and ROOT/.../SLIDE.svs as gdc-client unpacks them, or tiles ROOT/SLIDE_X_Y.png",
)
