"""What a run must keep to go on bit for bit: weights, optimizer moments, EMA, random states, step.

``checkpoints/step-00001000/`` holds
  ``rank-00000-of-00002.safetensors``  the pieces that a process keeps, float32 and flat: ``weight/NAME``, ``ema/NAME``,
                                       and the optimizer's fields; the header says which part of a parameter each is
  ``model/``                           everything of a model folder but its weights: see `medim export`
  ``state.json``                       step, processes, config, versions; written last

Every process writes its own file, nothing is gathered. Since each piece says which part of which parameter it is, a
checkpoint can be gone on with by any number of processes and by any other way of sharing (`medim.training.engine`), and
`Checkpoint.whole` puts a model together without any of them. The folder is written aside, flushed, and renamed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from medim.errors import UserError
from medim.model.adapters import is_adapters, write_weights
from medim.training.engine import EMA, Engine
from medim.training.folders import STATE_NAME, flush, write_folder

FORMAT = 2
EXTRA = "extra."


def save(
    folder: Path, step: int, engine: Engine, ema: EMA, fill_model: Callable[[Path], None], extra: Mapping[str, Any]
) -> None:
    """Write a checkpoint after `step`; all processes call it, and `folder` appears when all have written.

    Raises:
        UserError: on all processes, if one could not write; nothing that was there before is lost.
    """
    accelerator = engine.accelerator
    aside = folder.with_name(f".{folder.name}.partial")
    lead = accelerator.is_main_process

    def prepare() -> None:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def write() -> None:
        rank, world = accelerator.process_index, accelerator.num_processes
        path = aside / f"rank-{rank:05d}-of-{world:05d}.safetensors"
        tensors, header = _gathered(engine, ema)
        save_file(tensors, path, metadata={"pieces": json.dumps(header)})
        flush(path)
        if lead:
            fill_model(aside / "model")
            for inner in (aside / "model").rglob("*"):
                flush(inner)

    def publish() -> None:
        state = {"format": FORMAT, "step": step, "processes": accelerator.num_processes, **extra}
        (aside / STATE_NAME).write_text(json.dumps(state) + "\n")
        flush(aside / STATE_NAME)
        flush(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
        flush(folder.parent)

    for action, everyone in ((prepare, False), (write, True), (publish, False)):
        error = _tried(action) if everyone or lead else ""
        said = [one for one in gather_object([error]) if one]
        if said:
            if lead:
                shutil.rmtree(aside, ignore_errors=True)
            raise UserError(f"{folder}: could not be written ({said[0]}); earlier checkpoints are whole")


def _tried(action: Callable[[], None]) -> str:
    """What went wrong, in words."""
    try:
        action()
    except (OSError, SafetensorError) as error:
        return " ".join(str(error).split()) or type(error).__name__
    return ""


def _gathered(engine: Engine, ema: EMA) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of this process's file, and what its header says of them."""
    speaks = not engine.replicated or engine.accelerator.is_main_process
    tensors: dict[str, Tensor] = {"rng": torch.get_rng_state()}
    header: dict[str, Any] = {}
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    for name, piece in engine.pieces.items() if speaks else ():
        if piece.stop == piece.start:
            continue
        fields, scalars = {"weight": piece.weight, "ema": ema.weights[name]}, {}
        for field, value in engine.moments(name).items():
            if not isinstance(value, Tensor):
                scalars[field] = value
            elif value.dim() == 0:
                scalars[field] = float(value)
            elif value.shape == piece.key.shape:
                fields[field] = piece.of(value)
            else:  # what 8-bit moments are scaled by
                tensors[f"{EXTRA}{field}/{name}"] = value.detach().cpu().clone()
        header[name] = {"start": piece.start, "stop": piece.stop, "shape": list(piece.shape), "scalars": scalars}
        tensors |= {f"{field}/{name}": value.detach().cpu().clone() for field, value in fields.items()}
    return tensors, header


class Checkpoint:
    """A complete checkpoint, opened for reading.

    Raises:
        UserError: a file is missing or broken, or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.state: dict[str, Any] = json.loads((folder / STATE_NAME).read_text())
            if self.state.get("format") != FORMAT:
                raise UserError(f"{folder}: a checkpoint of another version of medim; this one reads format {FORMAT}")
            world = int(self.state["processes"])
            self.paths = [folder / f"rank-{r:05d}-of-{world:05d}.safetensors" for r in range(world)]
            self.parts: dict[str, list[tuple[int, int, Path]]] = {}
            self.shapes: dict[str, list[int]] = {}
            self.scalars: dict[str, dict[str, float]] = {}
            self.fields: list[str] = []
            for path in self.paths:
                with safe_open(path, "pt") as file:
                    header = json.loads((file.metadata() or {})["pieces"])
                    fields = {key.split("/")[0] for key in file.keys() if "/" in key}  # noqa: SIM118
                    self.fields = self.fields or sorted(fields)
                for name, said in header.items():
                    self.parts.setdefault(name, []).append((said["start"], said["stop"], path))
                    self.shapes[name], self.scalars[name] = said["shape"], said["scalars"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise UserError(f"{folder}: a broken checkpoint ({' '.join(str(error).split())[:200]})") from error

    def moments_of(self, name: str) -> list[str]:
        """The optimizer's fields of a parameter: not every one is stepped in the same way."""
        with safe_open(self.parts[name][0][2], "pt") as file:
            there = {key.split("/")[0] for key in file.keys() if key.endswith(f"/{name}")}  # noqa: SIM118
        return sorted(field for field in there - {"weight", "ema"} if not field.startswith(EXTRA))

    def read(self, field: str, name: str, start: int, stop: int) -> Tensor:
        """Part start..stop of a flattened tensor, from whichever files hold it."""
        found = {}
        for first, last, path in self.parts.get(name, []):
            a, b = max(start, first), min(stop, last)
            if a < b:
                with safe_open(path, "pt") as file:
                    found[a] = file.get_slice(f"{field}/{name}")[a - first : b - first]
        covered = sum(map(len, found.values()))
        if covered != stop - start:
            raise UserError(f"{self.folder}: {field} of {name} is not all there: {covered} of {stop - start} values")
        return torch.cat([found[a] for a in sorted(found)]) if found else torch.empty(0)

    def extra(self, name: str) -> dict[str, Tensor]:
        """What the optimizer keeps of a parameter beside tensors of its shape; of a run whose processes hold all."""
        fields = [field for field in self.fields if field.startswith(EXTRA)]
        path = self.parts[name][0][2]
        with safe_open(path, "pt") as file:
            there = set(file.keys())
            return {
                field.removeprefix(EXTRA): file.get_tensor(f"{field}/{name}")
                for field in fields
                if f"{field}/{name}" in there
            }

    def whole(self, field: str) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of a field in its own shape."""
        for name, shape in self.shapes.items():
            yield name, self.read(field, name, 0, torch.Size(shape).numel()).view(shape)

    def restore(self, engine: Engine, ema: EMA) -> int:
        """Put everything in place; all processes call it. Returns the step.

        Raises:
            UserError: it is not a checkpoint of this model.
        """
        differ = sorted(set(self.shapes) ^ _everywhere(engine))
        if differ:
            raise UserError(f"{self.folder}: not a checkpoint of this model: {len(differ)} names differ, {differ[0]}")
        for name, piece in engine.pieces.items():
            if list(piece.shape) != self.shapes[name]:
                raise UserError(f"{self.folder}: {name} is {self.shapes[name]}, wanted {list(piece.shape)}")
            span = (name, piece.start, piece.stop)
            with torch.no_grad():
                piece.weight.copy_(self.read("weight", *span))
                ema.weights[name].copy_(self.read("ema", *span))
            engine.restore(name, {f: self.read(f, *span) for f in self.moments_of(name)}, self.scalars[name])
            engine.moments(name).update(self.extra(name))
        engine.refresh()
        rank, world = engine.accelerator.process_index, engine.accelerator.num_processes
        if world == len(self.paths):
            with safe_open(self.paths[rank], "pt") as file:
                torch.set_rng_state(file.get_tensor("rng"))
                if torch.cuda.is_available() and "rng_cuda" in file.keys():  # noqa: SIM118
                    torch.cuda.set_rng_state(file.get_tensor("rng_cuda"))
        return int(self.state["step"])


def _everywhere(engine: Engine) -> set[str]:
    """Names of the trained parameters, also of those of which this process keeps nothing."""
    return {name for name, parameter in engine.inner.named_parameters() if parameter.requires_grad}


class Averaged:
    """The averaged weights of a checkpoint, as `medim.training.weights.Stored` gives those of a model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._found = folder, Checkpoint(folder)
        self.files = self._found.shapes

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            UserError: there is none of this name.
        """
        if name not in self.files:
            raise UserError(f"{self.folder}: weights do not fit config.json: {name} is missing")
        shape = torch.Size(self.files[name])
        return self._found.read("ema", name, 0, shape.numel()).view(shape)


def export(checkpoint: Path, out: Path, field: str = "ema", dtype: torch.dtype = torch.float32) -> Path:
    """Make a model folder of a checkpoint, on one process and without the run that wrote it.

    Args:
        field: ``ema``, the averaged weights, or ``weight``, the last ones.

    Raises:
        UserError: the checkpoint is broken, or `out` cannot be written.
    """
    found = Checkpoint(checkpoint)
    write_folder(out, lambda aside: fill(aside, found, field, dtype))
    return out


def fill(folder: Path, found: Checkpoint, field: str, dtype: torch.dtype) -> None:
    """Write a model folder: what the checkpoint keeps of it, and its weights."""
    shutil.copytree(found.folder / "model", folder, dirs_exist_ok=True)
    state = {name: value.to(dtype) for name, value in found.whole(field)}
    if is_adapters(folder):
        write_weights(folder, state)
    else:
        save_torch_state_dict(state, folder)
