"""Model folders on the HuggingFace hub: pushed with a card that is written from the run.

A folder is loaded from there wherever a model is named: ``MeDiM.from_pretrained("user/name")``, ``sample.py
user/name``. Only safetensors, JSON and text are fetched (`medim.loading.download`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from medim.errors import UserError
from medim.loading import FILES, resolve
from medim.model import adapters
from medim.pipeline import MeDiM

CARD = "README.md"
LIMITS = """Everything this model makes is **synthetic**: images and reports that never belonged to a patient. They can
look real and be wrong, and they repeat what the training data hold, biases included. **Not for diagnosis, nor for any
other use in the care of patients.** Keep generated files marked as synthetic, and check before publishing the weights
that the licence of the training data allows it: a model can memorise what it was trained on (`python -m eval.run`
measures that)."""


def from_pretrained(name: str, **more: Any) -> MeDiM:
    """`MeDiM.from_pretrained`: a folder, ``demo``, or ``user/name`` on the hub."""
    return MeDiM.from_pretrained(name, **more)


def push_to_hub(
    folder: str | Path, name: str, *, run: str | Path | None = None, private: bool = False, licence: str = ""
) -> str:
    """Upload a model folder with its card; returns its address.

    Args:
        name: ``user/name`` on the hub; made if it is not there.
        run: the training run's folder, whose config and figures the card gives; None: the folder above, if it is one.
        licence: the hub's name of it, such as ``apache-2.0``; empty: the card names none.

    Raises:
        UserError: no model folder, an incomplete one, or the hub refuses or cannot be reached.
    """
    folder = resolve(folder)
    card = model_card(folder, name, run=run, licence=licence)
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = api.create_repo(name, private=private, exist_ok=True)
        api.upload_file(path_or_fileobj=card.encode(), path_in_repo=CARD, repo_id=name)
        api.upload_folder(folder_path=str(folder), repo_id=name, allow_patterns=list(FILES), ignore_patterns=[CARD])
    except Exception as error:  # the hub's transport has errors of its own in each release
        raise UserError(
            f"{name}: the hub refused or could not be reached ({' '.join(str(error).split())[:300]})"
        ) from error
    return str(address)


def model_card(folder: str | Path, name: str, *, run: str | Path | None = None, licence: str = "") -> str:
    """What a stranger must know of a model, as the hub's README.md: every figure is read from files of the run.

    Raises:
        UserError: no model folder, or `run` is not the folder of a run.
    """
    folder = resolve(folder)
    config = json.loads((folder / "config.json").read_text())
    trunk, slots = config["backbone"], json.loads((folder / "report_slots.json").read_text())
    base = adapters.read_settings(folder).base if adapters.is_adapters(folder) else ""
    head: dict[str, Any] = {
        "library_name": "medim",
        "tags": ["medim", "discrete-diffusion", "medical", "synthetic-data"],
    }
    head |= ({"license": licence} if licence else {}) | ({"base_model": base} if base else {})
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False)}---\n\n# {name}",
        "Medical images and reports by masked discrete diffusion over one vocabulary (MeDiM, arXiv 2510.06131).",
        f"## Use\n\n```\npip install medim\nmedim sample {name} {_example(slots)} --out out\n```\n\n"
        f'```python\nfrom medim import MeDiM\n\nmodel = MeDiM.from_pretrained("{name}")\n```',
        f"## What it must not be used for\n\n{LIMITS}",
        "## What it is\n\n" + _table(_about(folder, config, trunk, slots, base)),
    ]
    parts += _of_run(_run_folder(folder, run))
    return "\n\n".join(parts) + "\n"


def _example(slots: Mapping[str, Any]) -> str:
    domain = next(iter(slots), "xray")
    return f"--task pair --domain {domain} -n 4"


def _about(
    folder: Path, config: Mapping[str, Any], trunk: Mapping[str, Any], slots: Mapping[str, Any], base: str
) -> Any:
    vocabulary, image = config["vocabulary"], json.loads((folder / "image_tokenizer" / "config.json").read_text())
    yield "modalities", ", ".join(slots) or "none: not trained yet"
    yield "backbone", f"{trunk['model_type']}, {trunk['num_hidden_layers']} layers of width {trunk['hidden_size']}"
    if base:
        yield "adapters over", f"`{base}`, which must be there to load them"
    yield "text tokenizer", f"{vocabulary['text'][1]} tokens"
    yield "image tokenizer", f"VQGAN, {image['n_embed']} codes, {image['resolution']} px"
    yield "noise schedule", config["schedule"]
    yield "given parts", f"attention `{config['condition_attention']}`, dropped with {config['condition_dropout']}"


def _run_folder(folder: Path, run: str | Path | None) -> Path | None:
    if run is not None and not (Path(run) / "config.yaml").is_file():
        raise UserError(f"{run}: not the folder of a training run: config.yaml is missing")
    above = Path(run) if run is not None else folder.parent
    return above if (above / "config.yaml").is_file() else None


def _of_run(run: Path | None) -> list[str]:
    """Data, training, figures and the config of a run; says so where there is none."""
    if run is None:
        return ["## Training\n\nThe files of the training run were not at hand when this card was written."]
    config = yaml.safe_load((run / "config.yaml").read_text())
    paths = config["data"]["path"]
    rows = []
    for path in [paths] if isinstance(paths, str) else paths:
        index = Path(path) / "index.json"
        found = json.loads(index.read_text()) if index.is_file() else {}
        splits = ", ".join(f"{count} {split}" for split, count in found.get("splits", {}).items())
        rows.append((Path(path).name, f"{found.get('source', 'unknown')}: {splits}" if found else "not at hand"))
    parts = ["## Data\n\n" + _table(rows)]
    o = config["train"]
    figures = [
        ("steps", o["steps"]),
        ("studies a step", o["batch_size"]),
        ("learning rate", o["lr"]),
        ("seed", config["seed"]),
    ]
    lines = _lines(run / "metrics.jsonl")
    if lines:
        figures += [(f"last training {key}, nats a token", lines[-1][key]) for key in ("loss_text", "loss_image")
                    if lines[-1].get(key)]  # fmt: skip
    parts.append("## Training\n\n" + _table(figures))
    checked = _lines(run / "validation.jsonl")
    if checked:
        last = checked[-1]
        named = {key: key.replace("/token", ", bound a token").replace("/", ", ") for key in last if key != "step"}
        told = [(name, last[key]) for key, name in named.items()]
        parts.append(f"## Validation after {last['step']} steps, nats a masked token\n\n" + _table(told))
    parts.append(f"<details><summary>config</summary>\n\n```yaml\n{(run / 'config.yaml').read_text()}```\n\n</details>")
    parts.append(
        f"Written by medim {version('medim')}, torch {version('torch')}, transformers {version('transformers')}."
    )
    return parts


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []


def _table(rows: Any) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
