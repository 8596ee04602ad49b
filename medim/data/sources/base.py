"""What a source is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.data.studies import Skipped, Study
from medim.errors import UserError


@dataclass(frozen=True)
class Source:
    """A reader and what a user must know of it.

    Attributes:
        read: called with the root and its options; yields studies (or what makes one when it is
            called), and `Skipped` for what cannot be one.
        options: a class marked with `medim.config.options`, whose attributes its docstring explains.
        about: one line: what it reads.
        layout: the tree it expects, for `medim prepare SOURCE --help`.
        packaged: an installed package has what it reads, so that ROOT may be left out and None be read.
    """

    read: Callable[[Any, Any], Iterator[Study | Skipped | Callable[[], Study]]]
    options: type
    about: str
    layout: str
    packaged: bool = False


def provenance(options: Any, reports: Any, limit: int | None = None) -> dict[str, Any]:
    """What a dataset is made of, as prepare.json says it: the options of its source and of reports."""
    said = {"source": dataclasses.asdict(options), "reports": dataclasses.asdict(reports), "limit": limit}
    return json.loads(json.dumps(said))


def files_under(root: Path) -> Iterator[Path]:
    """Every file under `root`, folder by folder in the order of their names; hidden ones are left out.

    Raises:
        UserError: `root` is no folder.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def split_of(patient: str, validation: float = 0.1, test: float = 0.1) -> str:
    """The split that a patient always falls into, by the hash of a name that need not be kept.

    Example:
        >>> {split_of(str(i)) for i in range(50)} == {"train", "validation", "test"}
        True
    """
    share = int.from_bytes(hashlib.sha256(f"split {patient}".encode()).digest()[:8], "big") / 2**64
    return "test" if share < test else "validation" if share < test + validation else "train"


def check_shares(validation: float, test: float) -> None:
    """Check the shares of the splits.

    Raises:
        UserError: one is negative, or nothing is left to train on.
    """
    if min(validation, test) < 0 or validation + test >= 1:
        raise UserError(f"validation={validation:g} test={test:g}: shares of at least 0 that leave some to train on")


def unique(found: Iterable[Study | Skipped]) -> Iterator[Study | Skipped]:
    """The same, but a study whose id came before is skipped."""
    seen: set[bytes] = set()
    for one in found:
        if isinstance(one, Study):
            key = hashlib.sha256(one.id.encode()).digest()[:12]
            if key in seen:
                yield Skipped(one.id, "", "a study of this id came before")
                continue
            seen.add(key)
        yield one


def read_text(path: Path) -> str:
    """A text file without the space around it: UTF-8 with or without a byte order mark, else Windows-1252."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig").strip()
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace").strip()
