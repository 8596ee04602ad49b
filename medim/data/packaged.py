"""Files that other packages ship: read at run time, never copied into ours."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def file_of(package: str, name: str) -> Path | None:
    """A file of an installed package, or None; the package is not imported.

    Example:
        >>> file_of("json", "decoder.py").name, file_of("json", "no such file")
        ('decoder.py', None)
    """
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        return None
    file = Path(spec.origin).parent / name
    return file if file.is_file() else None
