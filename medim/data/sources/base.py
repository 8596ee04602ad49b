"""What a source is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medim.data.studies import Skipped, Study


@dataclass(frozen=True)
class Source:
    """A reader and what a user must know of it.

    Attributes:
        read: called with the root and its options; yields studies (or what makes one when it is
            called), and `Skipped` for what cannot be one.
        options: a class marked with `medim.config.options`, whose attributes its docstring explains.
        about: one line: what it reads.
        layout: the tree it expects, for `medim prepare SOURCE --help`.
    """

    read: Callable[[Path, Any], Iterator[Study | Skipped | Callable[[], Study]]]
    options: type
    about: str
    layout: str


def split_of(patient_id: str) -> str:
    """The split of a patient where a source names none: by hash, 80 percent train, 10 validation, 10 test."""
    part = int.from_bytes(hashlib.sha256(patient_id.encode()).digest()[:8], "big") % 10
    return "test" if part == 0 else "validation" if part == 1 else "train"


def unique(found: Iterable[Study | Skipped]) -> Iterator[Study | Skipped]:
    """The same, but a study whose id came before is skipped."""
    seen: set[bytes] = set()
    for one in found:
        key = hashlib.sha256(one.id.encode()).digest()[:12]
        if isinstance(one, Study) and key in seen:
            yield Skipped(one.id, "", "a study of this id came before")
            continue
        seen.add(key)
        yield one


def read_text(path: Path) -> str:
    """A text file: UTF-8 with or without a byte order mark, else Windows-1252; line ends as they come."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")
