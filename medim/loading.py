"""Model folders: where they are, here or on the hub, and their networks; adapters are merged into their base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from medim.errors import UserError
from medim.model import adapters
from medim.model.medim import MeDiMConfig, MeDiMModel
from medim.vocabulary import Vocabulary

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("demo",)
FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md")  # what is fetched, and pushed: no pickle


def resolve(name: str | Path) -> Path:
    """The folder of a model name: a folder, a shipped model, or ``user/name`` on the hub, which is fetched.

    Raises:
        UserError: it does not exist or is not a model folder.
    """
    folder = ASSETS / str(name) if str(name) in SHIPPED else Path(name)
    if is_hub_name(name):
        folder = download(str(name))
    if not folder.is_dir():
        raise UserError(f"{name}: no such model; give a folder such as runs/demo/final, or `demo` for the shipped one")
    for part in ("config.json", "canvas.json", "report_slots.json"):
        if not (folder / part).is_file():
            raise UserError(f"{name}: not a MeDiM model folder: {part} is missing")
    if not adapters.is_adapters(folder) and not any(folder.glob("model*.safetensors")):
        raise UserError(f"{name}: not a MeDiM model folder: model.safetensors is missing")
    return folder


def is_hub_name(name: str | Path) -> bool:
    """Whether this is no path here but looks like ``user/name``."""
    path = Path(name)
    return (
        bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name))) and not path.exists() and not path.parent.is_dir()
    )


def download(name: str) -> Path:
    """The folder of a model of the hub, fetched once; of its files only those of `FILES`.

    Raises:
        UserError: there is no such model, or the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(FILES)))
    except Exception as error:  # the hub's transport has errors of its own in each release
        raise UserError(
            f"{name}: no such folder here, and not to be had from the hub ({' '.join(str(error).split())[:200]})"
        ) from error


def load_network(folder: Path, base: str | Path | None = None) -> MeDiMModel:
    """The network of a model folder, or of adapters over their base."""
    if not adapters.is_adapters(folder):
        if base is not None:
            raise UserError(f"{folder}: a whole model, not adapters: it needs no base")
        return _load_weights(folder)
    named = str(base or adapters.read_settings(folder).base)
    places = [ASSETS / named] if named in SHIPPED else [Path(named), folder.parent / named]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None and is_hub_name(named):
        found = download(named)
    if found is None:
        raise UserError(
            f"{folder}: these adapters need the model they were trained over, and {named!r} is no such folder; name "
            "it: --base DIR, or from_pretrained(..., base=DIR)"
        )
    config = MeDiMConfig.from_pretrained(folder)
    if adapters.check_base(folder, found, config):
        own, config.places = config.places, MeDiMConfig.from_pretrained(found).places
        model = _load_weights(found, config)
        model.set_places(own)  # those of the adapters' resolution, whose table they have
    else:
        model = MeDiMModel.from_backbone(found, Vocabulary.from_dict(config.vocabulary), config=config)
    adapters.apply_adapters(model, folder)
    return model


def _load_weights(folder: Path, config: MeDiMConfig | None = None) -> MeDiMModel:
    """The weights, all of them: `from_pretrained` alone would fill what is missing with random numbers."""
    try:
        loaded: Any = MeDiMModel.from_pretrained(
            folder, config=config, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, said = loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if said[what]:
            name = sorted(map(str, said[what]))[0]
            raise UserError(
                f"{folder}: weights do not fit config.json: {len(said[what])} {what.split('_')[0]}, first {name}"
            )
    return model
