"""What all text metrics share: pairs that are checked, optional packages that are asked for by name."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from medim.errors import UserError


def check_pairs(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    """Nothing, if each text has its reference.

    Raises:
        ValueError: no pairs, or lists of different lengths.
    """
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: give as many, one at least")


def optional(module: str, extra: str) -> Any:
    """A module of a package that only some metrics need.

    Raises:
        UserError: it is not installed; the message has the pip line `extra`.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(f"{module.partition('.')[0]} is not installed, or not whole ({error}): {extra}") from error
