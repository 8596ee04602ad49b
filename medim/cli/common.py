"""What the commands share: parsers, devices, listings."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

from medim.errors import UserError


def make_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser whose help is `description` as it stands."""
    return argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )


def quiet() -> None:
    """Libraries keep to warnings: their own progress bars would hide ours."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


def pick_device(name: str | None) -> str:
    """The device asked for, or cuda where there is one.

    Raises:
        UserError: it cannot be used.
    """
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {chosen}: not usable here ({str(error).splitlines()[0]})") from error
    return chosen


def listed_path(listing: str, name: str) -> Path:
    """A file named in a listing: relative to the listing, or to here."""
    beside = Path(listing).parent / name
    return beside if beside.exists() else Path(name)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a listing, one a line.

    Raises:
        UserError: no such file, a line that is no JSON object, no line at all.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not JSON ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f'{path}:{number}: a JSON object is wanted, such as {{"image": "a.png"}}')
        lines.append(value)
    if not lines:
        raise UserError(f"{path}: holds no studies")
    return lines


def described(options: type) -> list[tuple[str, str, bool]]:
    """Each field of an options dataclass, what its docstring says of it, and whether it is a mapping."""
    text = inspect.cleandoc(options.__doc__ or "").split("Attributes:\n")[-1]
    told = dict(re.findall(r"^ +(\w+): (.*(?:\n {6,}.*)*)", text, re.MULTILINE))
    found = []
    for field in dataclasses.fields(options):
        default = "" if field.default is dataclasses.MISSING else field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        about = " ".join(told.get(field.name, "").split()).rstrip(".").replace("%", "%%")
        found.append((field.name, about + (f" ({shown})" if shown else ""), "dict" in str(field.type)))
    return found
