"""From a model's structure to its weights, a unit at a time: no process holds more than its share and one unit.

A model is built on the meta device (`skeleton`), then each of its units (a decoder layer, an embedding, the head) is
given memory, filled from a folder or drawn, and handed on at once: to a device, to ZeRO-3, to FSDP. What is drawn is a
pure function of (seed, name of the unit), so every way of sharing a model starts from the same weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from medim.errors import UserError
from medim.model.lora import draw_factor, plain_name, quantise


def skeleton() -> AbstractContextManager[None]:
    """A context in which modules are built without memory for their parameters; buffers are real."""
    return init_empty_weights(include_buffers=False)


@runtime_checkable
class Source(Protocol):
    """Tensors by name, with the folder that messages name."""

    folder: Path

    @property
    def files(self) -> Collection[str]:
        """The names."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor; UserError if there is none of this name."""
        ...


class Stored:
    """The tensors of a model folder, read one by one.

    Raises:
        UserError: the folder has no safetensors, or they cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        index = folder / "model.safetensors.index.json"
        try:
            if index.is_file():
                self.files = json.loads(index.read_text())["weight_map"]
            else:
                with safe_open(folder / "model.safetensors", "pt") as file:
                    self.files = dict.fromkeys(file.keys(), "model.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: weights cannot be read ({' '.join(str(error).split())[:200]})") from error

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.files:
            raise UserError(f"{self.folder}: weights do not fit config.json: {name} is missing")
        try:
            with safe_open(self.folder / self.files[name], "pt") as file:
                return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / self.files[name]}: cannot be read ({error})") from error


def units(
    model: nn.Module, prefix: str = "", owner: PreTrainedModel | None = None
) -> Iterator[tuple[str, nn.Module, PreTrainedModel]]:
    """Name, module and owner of each unit: the largest modules that are neither a model nor a list."""
    owner = model if isinstance(model, PreTrainedModel) else owner
    assert owner is not None
    for name, child in model.named_children():
        if isinstance(child, PreTrainedModel | nn.ModuleList):
            yield from units(child, f"{prefix}{name}.", owner)
        else:
            yield prefix + name, child, owner


def draw(unit: nn.Module, owner: PreTrainedModel, seed: int, name: str) -> None:
    """Fresh weights, as the unit's classes and its model's `_init_weights` have them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        for module in unit.modules():
            getattr(module, "reset_parameters", lambda: None)()
        unit.apply(owner._init_weights)


def materialise(
    model: nn.Module,
    stored: Source | None,
    seed: int,
    device: torch.device | str,
    hand_on: Callable[[str, nn.Module], None] | None = None,
    fill: bool = True,
) -> None:
    """Give a skeleton its weights.

    Args:
        stored: where they are read from; None: they are drawn.
        hand_on: takes a unit that has its weights, by name, and may partition it.
        fill: False leaves the memory as it is: another process's weights will be put there.

    Raises:
        UserError: the stored weights do not fit.
    """
    born: dict[int, nn.Parameter] = {}  # tied parameters stay one
    read: set[str] = set()
    lora = getattr(model, "lora", None)
    bits = lora.options.bits if lora is not None else 0
    for name, unit, owner in list(units(model)):
        new: list[str] = []
        for inner, module in unit.named_modules():
            for key, parameter in module._parameters.items():
                if parameter is None or parameter.device.type != "meta":
                    continue
                if id(parameter) not in born:
                    empty = torch.empty_like(parameter, device=device)
                    born[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                    new.append(".".join(filter(None, (name, inner, key))))
                module._parameters[key] = born[id(parameter)]
        if new and fill:
            if stored is None:
                draw(unit, owner, seed, name)
                getattr(model, "drawn", lambda unit, seed: None)(unit, seed)
            else:
                read |= _copy(model, stored, new, seed)
        for buffer_owner in unit.modules():
            for key, buffer in buffer_owner._buffers.items():
                buffer_owner._buffers[key] = buffer if buffer is None else buffer.to(device)
        quantise(unit, bits)
        if hand_on is not None:
            hand_on(name, unit)
    if stored is not None and fill:
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        unknown = sorted(set(stored.files) - read - set(tied))
        if unknown:
            raise UserError(f"{stored.folder}: weights do not fit config.json: {len(unknown)} unknown, {unknown[0]}")


@torch.no_grad()
def _copy(model: nn.Module, stored: Source, names: list[str], seed: int) -> set[str]:
    """Fill parameters from a folder, and adapters' factors with fresh ones; returns the names that were read."""
    read = set()
    for name in names:
        parameter, plain = model.get_parameter(name), plain_name(name)
        if plain is None:
            draw_factor(name, parameter, seed)
            continue
        value = getattr(model, "fitted", lambda _, value: value)(plain.name, stored.read(plain.name))
        value = value[plain.start : plain.stop]
        if parameter.shape != value.shape:
            raise UserError(
                f"{stored.folder}: weights do not fit config.json: {plain.name} is {list(value.shape)}, "
                f"wanted {list(parameter.shape)}"
            )
        parameter.copy_(value)
        read.add(plain.name)
    return read
