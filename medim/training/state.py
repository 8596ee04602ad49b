"""What a run must keep to go on bit for bit: weights, optimizer moments, EMA, step. Written aside, then renamed.

A checkpoint folder holds ``model/`` (loadable by itself), ``ema.safetensors``, ``optimizer.safetensors`` and
``state.json``, which is written last: a folder without it is torn, and skipped.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medim.errors import UserError

Moments = dict[str, Tensor]


class EMA:
    """Exponential moving average of the weights: e <- d e + (1 - d) w; d rises to `decay` over the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = [], []
        for name, value in model.named_parameters():
            ours.append(self.weights[name])
            theirs.append(value.detach().to(self.weights[name].dtype))
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average in the place of the weights."""
        for name, value in model.named_parameters():
            value.copy_(self.weights[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The optimizer's state as named tensors: ``<parameter>/<field>``."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for field, value in state.items():
            tensors[f"{names[id(parameter)]}/{field}"] = torch.as_tensor(value).detach().clone().contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        optimizer.state[parameters[name]][field] = value.to(parameters[name].device)


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
        for path in aside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{folder}: could not be written ({error}); earlier checkpoints are intact") from error


def save_checkpoint(
    folder: Path,
    step: int,
    save_model: Callable[[Path], None],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: EMA,
    extra: dict[str, Any],
) -> None:
    """Write everything a run needs to go on after `step`."""

    def fill(aside: Path) -> None:
        save_model(aside / "model")
        save_file({k: v.contiguous() for k, v in ema.weights.items()}, aside / "ema.safetensors")
        save_file(optimizer_tensors(optimizer, model), aside / "optimizer.safetensors")
        rng = torch.get_rng_state().numpy().tobytes().hex()
        (aside / "state.json").write_text(json.dumps({"step": step, "rng": rng, **extra}) + "\n")

    write_folder(folder, fill)


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps; torn ones are skipped with a warning."""
    for path in sorted(folder.glob("step-*"), reverse=True):
        if (path / "state.json").is_file():
            return path
        warnings.warn(f"{path} is incomplete and is skipped", stacklevel=2)
    return None


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        shutil.rmtree(path)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ema: EMA) -> dict[str, Any]:
    """Put a checkpoint's tensors in place; returns what ``state.json`` holds."""
    shards = sorted((folder / "model").glob("model*.safetensors"))
    weights = {name: value for shard in shards for name, value in load_file(shard).items()}
    lacking, unknown = model.load_state_dict(weights, strict=False)
    lacking = [name for name in lacking if name not in (getattr(model, "all_tied_weights_keys", None) or {})]
    if lacking or unknown:
        raise UserError(f"{folder}: not a checkpoint of this model: lacks {lacking[:3]}, has unknown {unknown[:3]}")
    ema.weights = load_file(folder / "ema.safetensors", device=str(next(model.parameters()).device))
    load_optimizer_tensors(optimizer, model, load_file(folder / "optimizer.safetensors"))
    state = json.loads((folder / "state.json").read_text())
    torch.set_rng_state(torch.frombuffer(bytearray.fromhex(state["rng"]), dtype=torch.uint8))
    return state
