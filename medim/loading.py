"""Model folders: where they are, and their networks; adapters are merged into their base."""

from __future__ import annotations

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


def resolve(name: str | Path) -> Path:
    """The folder of a model name.

    Raises:
        UserError: it does not exist or is not a model folder.
    """
    folder = ASSETS / str(name) if str(name) in SHIPPED else Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: no such model; give a folder such as runs/demo/final, or `demo` for the shipped one")
    for part in ("config.json", "canvas.json", "report_slots.json"):
        if not (folder / part).is_file():
            raise UserError(f"{name}: not a MeDiM model folder: {part} is missing")
    if not adapters.is_adapters(folder) and not any(folder.glob("model*.safetensors")):
        raise UserError(f"{name}: not a MeDiM model folder: model.safetensors is missing")
    return folder


def load_network(folder: Path, base: str | Path | None = None) -> MeDiMModel:
    """The network of a model folder, or of adapters over their base."""
    if not adapters.is_adapters(folder):
        if base is not None:
            raise UserError(f"{folder}: a whole model, not adapters: it needs no base")
        return _load_weights(folder)
    named = str(base or adapters.read_settings(folder).base)
    places = [ASSETS / named] if named in SHIPPED else [Path(named), folder.parent / named]
    found = next((place for place in places if (place / "config.json").is_file()), None)
    if found is None:
        raise UserError(
            f"{folder}: these adapters need the model they were trained over, and {named!r} is no such folder; name "
            "it: --base DIR, or from_pretrained(..., base=DIR)"
        )
    config = MeDiMConfig.from_pretrained(folder)
    if adapters.check_base(folder, found, config):
        model = _load_weights(found, config)
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
