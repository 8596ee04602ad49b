"""Folders that appear whole or not at all, and which of them a run goes on from."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from medim.errors import UserError

STATE_NAME = "state.json"


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill` write into a folder aside, flush it to the disk, and only then give it its name.

    Raises:
        UserError: the disk is full or not writable; nothing that was there is lost.
    """
    aside = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        fill(aside)
        for path in (*aside.rglob("*"), aside):
            flush(path)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        flush(folder.parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: could not be written ({error}); earlier checkpoints are intact") from error


def latest_checkpoint(folder: Path, check: Callable[[Path], object] = lambda path: None) -> Path | None:
    """The complete checkpoint with the most steps; torn ones are skipped with a warning.

    Args:
        check: opens one, and raises UserError if it is broken.
    """
    for path in sorted(folder.glob("step-*"), reverse=True):
        if not (path / STATE_NAME).is_file():
            warnings.warn(f"{path} is incomplete and is skipped", stacklevel=2)
            continue
        try:
            check(path)
        except UserError as error:
            warnings.warn(f"{error}; it is skipped", stacklevel=2)
            continue
        return path
    return None


def prune(folder: Path, keep: int, keep_every: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every`-th step."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        if not keep_every or int(path.name.removeprefix("step-")) % keep_every:
            shutil.rmtree(path)


def same_config(run_dir: Path, resolved: str) -> bool:
    """Whether a run's stored config is this one."""
    path = run_dir / "config.yaml"
    return path.is_file() and path.read_text() == resolved


def flush(path: Path) -> None:
    """Have the disk hold a file or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
