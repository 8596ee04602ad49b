"""Options files: YAML with a base, overridden from the command line, checked against frozen dataclasses.

Each options dataclass stands beside the code that reads it and is marked with `options`; this module only
knows how to fill one. All mistakes are reported at once, each with its file, its key and what was meant.

Example:
    >>> @options
    ... class Train:
    ...     steps: int = 1000
    ...     lr: float = 3e-4
    >>> load("config.yaml", ["lr=1e-3"], Train)  # doctest: +SKIP
    Train(steps=1000, lr=0.001)
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, dataclass_transform, get_args, get_origin, get_type_hints

import pydantic
import pydantic.dataclasses
import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from medim.errors import UserError

T = TypeVar("T")
Loc = Sequence[int | str]


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, pydantic.Field))
def options(cls: type[T]) -> type[T]:
    """Class decorator: a frozen dataclass that checks its types and refuses unknown keys."""
    checked: Any = pydantic.dataclasses.dataclass(frozen=True, config=pydantic.ConfigDict(extra="forbid"))(cls)
    return checked


def load(path: str | Path | None, overrides: Sequence[str], schema: type[T]) -> T:
    """Read `path` over its ``base:`` files, apply ``a.b=c`` overrides (last wins), check against `schema`.

    A `path` of None is an empty file.

    ``base:`` names another YAML, relative to the file that says so. Mappings merge, all else is replaced. A
    number in an override's key indexes a list: ``tasks.0.weight=2``.

    Raises:
        UserError: a missing or broken file, an override without ``=``; unknown keys, missing keys and wrong
            types, all of them at once, a line each.
    """
    layers = [("command line", OmegaConf.create({}))] if path is None else _read(Path(path), ())
    config = OmegaConf.merge(*(tree for _, tree in layers))
    assert isinstance(config, DictConfig)
    overridden = [_override(config, override) for override in overrides]
    try:
        data = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_line(error)}") from None
    try:
        return pydantic.TypeAdapter(schema).validate_python(data)
    except pydantic.ValidationError as error:
        lines: dict[str, str] = {}
        for detail in error.errors(include_url=False):
            loc = _written(detail, data)
            key = ".".join(map(str, loc))
            if key in lines:  # one error for each arm of a union
                lines[key] += f" or {_wanted(detail['msg'])}"
            else:
                where = _origin(loc, layers, overridden)
                lines[key] = ": ".join(filter(None, (where, key, _say(detail, loc, schema))))
        raise UserError("\n".join(lines.values())) from None


def dump(config: Any) -> str:
    """The resolved options as YAML; `load` of it gives an equal object."""
    plain = pydantic.TypeAdapter(type(config)).dump_python(config, mode="json")
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def _read(path: Path, above: tuple[Path, ...]) -> list[tuple[str, DictConfig]]:
    """The file and its bases, lowest first, each with the name that messages give it."""
    if path.resolve() in above:
        raise UserError(f"{path}: base: the file is a base of itself; remove one `base:` of the circle")
    if not path.is_file():
        named_by = f" (named as base by {above[-1]})" if above else ""
        raise UserError(f"{path}: no such file{named_by}; give the path of a YAML file")
    try:
        tree = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: broken YAML: {_line(error)}") from None
    if not isinstance(tree, DictConfig):
        raise UserError(f"{path}: holds a list; write `key: value` lines at the top level")
    base = tree.pop("base", None)
    below = [] if base is None else _read(path.parent / str(base), (*above, path.resolve()))
    return [*below, (str(path), tree)]


def _override(config: DictConfig, override: str) -> str:
    """Put one ``a.b=value`` into `config`; returns the dotted key."""
    key, equals, value = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"command line: {override!r}: no override; write key=value, as in train.steps=100")
    try:
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        assert isinstance(parsed, dict)
        OmegaConf.update(config, key, parsed["value"], force_add=True)
    # OmegaConf asserts that what the key passes through is a mapping or a list
    except (yaml.YAMLError, OmegaConfBaseException, AssertionError, LookupError, TypeError, ValueError) as e:
        raise UserError(f"command line: {override}: cannot be applied: {_line(e)}") from None
    return key


def _written(detail: Any, data: Any) -> list[int | str]:
    """The keys of pydantic's error location that a user writes, that is without the names of union arms."""
    *parents, last = detail["loc"] or [""]
    keys: list[int | str] = []
    for part in parents:
        if _holds(data, part):
            data = data[part]
            keys.append(part)
    return [*keys, last] if _holds(data, last) or detail["type"] == "missing" else keys


def _holds(tree: Any, part: int | str) -> bool:
    return part in tree if isinstance(tree, Mapping) else isinstance(tree, list) and part in range(len(tree))


def _origin(loc: Loc, layers: Sequence[tuple[str, DictConfig]], overridden: Sequence[str]) -> str:
    """Who set the key: the command line or a file; the topmost file for a key that is missing."""
    key = ".".join(map(str, loc))
    if key and any(f"{other}.".startswith(f"{key}.") or f"{key}.".startswith(f"{other}.") for other in overridden):
        return "command line"
    for name, layer in reversed(layers):
        tree: Any = OmegaConf.to_container(layer)
        for part in loc:
            if not _holds(tree, part):
                break
            tree = tree[part]
        else:
            return name
    return layers[-1][0]


def _say(detail: Any, loc: Loc, schema: Any) -> str:
    """What is wrong with one key, and what to do."""
    match detail["type"]:
        case "unexpected_keyword_argument":
            known = _fields(schema, loc[:-1])
            close = difflib.get_close_matches(str(loc[-1]), known, n=1)
            hint = f'did you mean "{close[0]}"?' if close else f"known here: {', '.join(known)}"
            return f"unknown key, {hint}"
        case "missing":
            return "missing, and there is no default; set it"
        case "value_error" | "assertion_error":
            return _wanted(detail["msg"])
    given = detail["input"]
    return f"{given!r} ({type(given).__name__}) given, wanted {_wanted(detail['msg'])}"


def _wanted(message: str) -> str:
    for opening in ("Input should be ", "Value error, ", "Assertion failed, "):
        message = message.removeprefix(opening)
    return message.split(", unable to ")[0]


def _fields(schema: Any, loc: Loc) -> list[str]:
    """The keys that are valid at `loc`, found by walking the annotations of `schema`."""
    origin, arguments = get_origin(schema), get_args(schema)
    if origin in (Union, UnionType):
        return [name for arm in arguments for name in _fields(arm, loc)]
    if dataclasses.is_dataclass(schema):
        if not loc:
            return [field.name for field in dataclasses.fields(schema)]
        hint = get_type_hints(schema).get(str(loc[0]))
        return _fields(hint, loc[1:])
    if loc and isinstance(origin, type):  # list[X], tuple[X, ...], dict[str, X]
        return _fields(arguments[-1 if issubclass(origin, Mapping) else 0], loc[1:])
    return []


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
