"""What a source is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
