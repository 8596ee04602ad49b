"""Adapters as a folder, and over the model that they were trained over.

``adapter_config.json`` and ``adapter_model.safetensors`` are peft's own and load into the backbone by peft alone;
``medim.safetensors`` has what was trained in full (AdaLN, time, places, rows of codes and tags), ``lora.json`` the
options and the fingerprint of the base. To load is to merge: the result is a plain model, as fast as its base.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from medim.errors import UserError
from medim.model.lora import Adapted, LoraOptions, Plain, plain_name, trained_names

if TYPE_CHECKING:
    from medim.model.medim import MeDiMModel

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OWN_CONFIG, OWN_WEIGHTS = "lora.json", "medim.safetensors"
_SAMPLE = 256  # values of each tensor that its fingerprint is taken from


def is_adapters(folder: Path) -> bool:
    """Whether a folder holds adapters."""
    return (folder / PEFT_CONFIG).is_file()


def write_settings(folder: Path, adapted: Adapted) -> None:
    """Write what says of which kind the adapters are, and over what."""
    from peft import LoraConfig

    o = adapted.options
    folder.mkdir(parents=True, exist_ok=True)
    targets: Any = sorted(o.targets)
    config = LoraConfig(r=o.rank, lora_alpha=o.alpha, lora_dropout=o.dropout, target_modules=targets)  # type: ignore[arg-type]
    config.base_model_name_or_path, config.inference_mode = adapted.base, True
    said = config.to_dict() | {"target_modules": targets}  # peft makes it a set
    (folder / PEFT_CONFIG).write_text(json.dumps(said, indent=1, sort_keys=True) + "\n")
    own = {"options": asdict(o), "fingerprint": adapted.fingerprint}
    (folder / OWN_CONFIG).write_text(json.dumps(own, indent=1) + "\n")


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write trained parameters, named as in the model that was trained (`trained_names`)."""
    factors, full = {}, {}
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if plain_name(name) is None:
            factors[_peft_name(name)] = value
        else:
            full[name] = value
    save_file(factors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    save_file(full, folder / OWN_WEIGHTS, metadata={"format": "pt"})


def read_settings(folder: Path) -> Adapted:
    """The inverse of `write_settings`.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        own = json.loads((folder / OWN_CONFIG).read_text())
        base = json.loads((folder / PEFT_CONFIG).read_text())["base_model_name_or_path"]
        options = LoraOptions(**own["options"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a folder of MeDiM's adapters ({' '.join(str(error).split())[:200]})") from error
    return Adapted(options, str(base or ""), str(own.get("fingerprint", "")))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The inverse of `write_weights`.

    Raises:
        UserError: a file is missing or damaged.
    """
    try:
        factors, full = load_file(folder / PEFT_WEIGHTS), load_file(folder / OWN_WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: adapters cannot be read ({' '.join(str(error).split())[:200]})") from error
    return {_own_name(name): value for name, value in factors.items()} | full


def _peft_name(name: str) -> str:
    return "base_model.model." + name.removeprefix("backbone.").replace(".default.weight", ".weight")


def _own_name(name: str) -> str:
    return "backbone." + name.removeprefix("base_model.model.").removesuffix(".weight") + ".default.weight"


@torch.no_grad()
def apply_adapters(model: MeDiMModel, folder: Path) -> None:
    """Merge the adapters of a folder into their plain base: W + alpha / rank * B A, and what was trained in full.

    Raises:
        UserError: the folder is damaged, or its adapters are of another base.
    """
    o, state = read_settings(folder).options, read_weights(folder)
    differ = sorted(trained_names(model, o) ^ set(state))
    if differ:
        raise UserError(f"{folder}: adapters do not fit their base: {len(differ)} names differ, first {differ[0]}")
    for name, value in state.items():
        plain, shape = plain_name(name), list(value.shape)
        if plain is None and ".lora_B." in name:
            continue  # comes with its A
        place = plain or Plain(name.replace(".lora_A.default", ""))
        target = model.get_parameter(place.name)[place.start : place.stop]
        if plain is None:
            b = state[name.replace(".lora_A.", ".lora_B.")]
            shape = [len(b), value.shape[1]]
        if shape != list(target.shape):
            raise UserError(
                f"{folder}: adapters do not fit their base: {name} is for {shape}, not for {[*target.shape]}"
            )
        if plain is None:
            target.add_(b.to(target.dtype) @ value.to(target.dtype), alpha=o.alpha / o.rank)
        else:
            target.copy_(value)


def fingerprint(folder: Path) -> str:
    """A hash of the names, the shapes and the first values of all weights in a folder; empty without safetensors."""
    found = hashlib.sha256()
    paths = sorted(folder.glob("model*.safetensors"))
    try:
        for path in paths:
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    part = file.get_slice(name)
                    shape = part.get_shape()
                    value = part[:1] if len(shape) > 1 else part[:_SAMPLE] if shape else file.get_tensor(name)
                    found.update(f"{name}{shape}".encode() + value.flatten()[:_SAMPLE].float().numpy().tobytes())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be read ({' '.join(str(error).split())[:200]})") from error
    return found.hexdigest()[:32] if paths else ""


def check_base(folder: Path, base: Path, config: Any) -> bool:
    """Whether the base of an adapters folder is a folder of MeDiM, not a plain language model.

    Args:
        config: the `MeDiMConfig` of the adapters.

    Raises:
        UserError: it is not what they were trained over; says how it differs.
    """
    try:
        other = json.loads((base / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{base / 'config.json'}: not JSON ({error})") from error
    ours = other.get("model_type") == "medim"
    trunk, known = other.get("backbone", {}) if ours else other, config.backbone
    said = []
    if ours and other.get("vocabulary") != json.loads(json.dumps(config.vocabulary)):
        said.append("the vocabulary differs")
    for key in ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"):
        if trunk.get(key) != known.get(key):
            said.append(f"{key} is {trunk.get(key)}, not {known.get(key)}")
    wanted = read_settings(folder).fingerprint
    if not said and is_adapters(base):
        raise UserError(f"{base}: holds adapters itself; merge them first: medim merge {base} --out DIR")
    if not said and wanted and fingerprint(base) != wanted:
        said.append("its weights are others")
    if said:
        raise UserError(
            f"{folder}: these adapters were not trained over {base}: {', '.join(said)}; name their own base: --base "
            "DIR, or from_pretrained(..., base=DIR)"
        )
    return ours
