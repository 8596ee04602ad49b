"""What readers of trees share: files in a fixed order, a split by patient, the text beside an image."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from medim.errors import UserError


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


def split_of(patient: str, validation: float, test: float) -> str:
    """The split that a patient always falls into, by the hash of a name that need not be kept.

    Example:
        >>> {split_of(str(i), 0.1, 0.1) for i in range(50)} == {"train", "validation", "test"}
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


def read_text(file: Path) -> str:
    """A report.

    Raises:
        UserError: it cannot be read, or is no UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"report {file} is not UTF-8: convert it") from error
    except OSError as error:
        raise UserError(f"report {file} cannot be read ({error.strerror})") from error
