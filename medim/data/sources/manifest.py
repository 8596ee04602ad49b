"""A table of studies: JSON lines, CSV or Parquet, with its columns named as it pleases."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medim.config import options
from medim.data.sources.base import Source, split_of, unique
from medim.data.sources.folder import SPLITS
from medim.data.sources.tables import rows
from medim.data.studies import Image, Skipped, Study
from medim.errors import UserError
from medim.vocabulary import MODALITIES

COLUMNS = ("id", "image", "report", "modality", "view", "patient", "split", "prompt")


@options
class ManifestOptions:
    """How the table is to be read.

    Attributes:
        columns: what a column is called, such as id=study; for each of id, image, report, modality, view, patient,
            split and prompt. Several columns of images or views are joined by +, as in image=frontal+lateral.
        modality: of all images, if the table has no such column.
        images: folder that paths of images are relative to, if it is not the table's own.
    """

    columns: dict[str, str] | None = None
    modality: str = ""
    images: str = ""


def read(root: Path, choice: ManifestOptions) -> Iterator[Study | Skipped]:
    """The rows in order. A cell of several images or views is a list, or parts joined by ``|``.

    Raises:
        UserError: no table, an unknown ending, a column that is not there, an unknown modality for all.
    """
    names = {name: name for name in COLUMNS} | dict(choice.columns or {})
    unknown = [name for name in names if name not in COLUMNS]
    if unknown:
        raise UserError(f"--columns {unknown[0]}=...: known are {', '.join(COLUMNS)}")
    if choice.modality and choice.modality not in MODALITIES:
        raise UserError(f"--modality {choice.modality}: one of {', '.join(MODALITIES)}")
    folder = Path(choice.images) if choice.images else root.parent
    return unique(_studies(root, folder, names, choice))


def _studies(root: Path, folder: Path, names: Mapping[str, str], choice: ManifestOptions) -> Iterator[Study | Skipped]:
    checked = False
    for number, row in enumerate(rows(root), start=1):
        if isinstance(row, str):
            yield Skipped(f"row {number}", root.name, row)
            continue
        if not checked and not root.name.endswith(("jsonl", "json")):  # lines of JSON may lack what is empty
            _check(root, names, choice, list(row))
            checked = True
        yield _study(number, row, folder, root, names, choice)


def _check(root: Path, names: Mapping[str, str], choice: ManifestOptions, there: Sequence[str]) -> None:
    """Columns that were named, and those that nothing goes without."""
    needed = {"image", "report", *(choice.columns or {})} | (set() if choice.modality else {"modality"})
    for name in sorted(needed):
        for column in names[name].split("+"):
            if column not in there:
                raise UserError(
                    f"{root}: no column {column!r} for {name}; there are {', '.join(there)}: "
                    f"say --columns {name}=COLUMN" + (", or --modality" if name == "modality" else "")
                )


def _study(
    number: int, row: Mapping[str, Any], folder: Path, root: Path, names: Mapping[str, str], choice: ManifestOptions
) -> Study | Skipped:
    def text(name: str) -> str:
        value = row.get(names[name])
        return "" if value is None else str(value).strip()

    def several(name: str) -> list[str]:
        found: list[str] = []
        for column in names[name].split("+"):
            value = row.get(column)
            parts = value if isinstance(value, list | tuple) else str("" if value is None else value).split("|")
            found += [str(part).strip() for part in parts if str(part).strip()]
        return found

    files, views = several("image"), several("view")
    id = text("id") or (Path(files[0]).with_suffix("").as_posix() if files else f"row-{number}")
    modality = choice.modality or text("modality")
    if not files:
        return Skipped(id, root.name, "no image in its row")
    if modality not in MODALITIES:
        return Skipped(id, root.name, f"modality {modality!r}: one of {', '.join(MODALITIES)}")
    if views and len(views) != len(files):
        return Skipped(id, root.name, f"{len(files)} images but {len(views)} views")
    patient, split = text("patient") or id, text("split").lower()
    if split and split not in SPLITS:
        return Skipped(id, root.name, f"split {split!r}: train, validation or test")
    images = tuple(
        Image(modality, folder / file, view) for file, view in zip(files, views or [""] * len(files), strict=True)
    )
    chosen = SPLITS[split] if split else split_of(patient)
    return Study(id, patient, images, text("report"), text("prompt"), chosen, "manifest")


SOURCE = Source(
    read,
    ManifestOptions,
    "a table of studies: JSON lines, CSV or Parquet",
    'ROOT.jsonl with {"id": "a", "image": "a.png", "report": "...", "modality": "xray"} a line, or the same as .csv, '
    ".tsv, .parquet; paths relative to the table",
)
