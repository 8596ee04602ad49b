"""The hub, with a folder in its place: what goes up comes down, with a card that says where the figures are from."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from medim import MeDiM, hub
from medim.cli import main
from medim.errors import UserError


@pytest.fixture
def repositories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that plays the hub."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, name: str, private: bool, exist_ok: bool) -> str:
            (root / name).mkdir(parents=True, exist_ok=exist_ok)
            return f"https://hub/{name}"

        def upload_file(self, path_or_fileobj: bytes, path_in_repo: str, repo_id: str) -> None:
            (root / repo_id / path_in_repo).write_bytes(path_or_fileobj)

        def upload_folder(
            self, folder_path: str, repo_id: str, allow_patterns: Sequence[str], ignore_patterns: Sequence[str]
        ) -> None:
            for file in Path(folder_path).rglob("*"):
                name = file.relative_to(folder_path).as_posix()
                kept = any(fnmatch.fnmatch(name, p) for p in allow_patterns) and name not in ignore_patterns
                if file.is_file() and kept:
                    (root / repo_id / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(file, root / repo_id / name)

    def snapshot(name: str, allow_patterns: Sequence[str]) -> str:
        if not (root / name).is_dir():
            raise OSError("404 repository not found")
        to = tmp_path / "cache" / name
        for file in (root / name).rglob("*"):
            inner = file.relative_to(root / name).as_posix()
            if file.is_file() and any(fnmatch.fnmatch(inner, p) for p in allow_patterns):
                (to / inner).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, to / inner)
        return str(to)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    return root


@pytest.fixture
def trained(tiny_model: Path, tmp_path: Path) -> Path:
    """A run with its final model, as train.py leaves it."""
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "final")
    data = tmp_path / "data"
    data.mkdir()
    (data / "index.json").write_text(json.dumps({"source": "open-i", "splits": {"train": 2745, "test": 328}}))
    config = {"data": {"path": str(data)}, "seed": 3, "train": {"steps": 70, "batch_size": 8, "lr": 0.0003}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "metrics.jsonl").write_text('{"step": 70, "loss_text": 1.25, "loss_image": null}\n')
    (run / "validation.jsonl").write_text(
        '{"step": 50, "loss": 3.5}\n{"step": 70, "loss": 3.25, "pair/xray/text": 3.5}\n'
    )
    return run


def test_what_is_pushed_is_what_loads(repositories: Path, trained: Path, tmp_path: Path, capsys: Any) -> None:
    (trained / "final" / "evil.bin").write_bytes(b"a pickle")
    asked = ["push", str(trained / "final"), "someone/model", "--licence", "apache-2.0"]
    assert main(asked) == 0
    assert "https://hub/someone/model" in capsys.readouterr().out
    (repositories / "someone/model" / "later.bin").write_bytes(b"a pickle")
    ours, theirs = MeDiM.from_pretrained(trained / "final"), hub.from_pretrained("someone/model")
    state = theirs.model.state_dict()
    assert all((state[name] == value).all() for name, value in ours.model.state_dict().items())
    assert not list(repositories.rglob("evil.bin")) and not list((tmp_path / "cache").rglob("*.bin"))
    out = tmp_path / "out"
    assert main(["sample", "someone/model", "--task", "pair", "-n", "1", "--steps", "2", "--out", str(out)]) == 0
    assert (out / "manifest.jsonl").is_file()


def test_the_card_says_what_the_run_says(trained: Path) -> None:
    card = hub.model_card(trained / "final", "someone/model", licence="apache-2.0")
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "medim" and head["license"] == "apache-2.0" and "base_model" not in head
    for words in (
        "xray, pathology", "llama, 2 layers of width 32", "16 codes, 96 px", "open-i: 2745 train, 328 test",
        "| steps | 70 |", "| learning rate | 0.0003 |", "loss_text, nats a token | 1.25", "Validation after 70 steps",
        "| pair, xray, text | 3.5 |", "synthetic", "Not for diagnosis", 'from_pretrained("someone/model")',
        "medim sample someone/model --task pair --domain xray",
    ):  # fmt: skip
        assert words in card, words


def test_without_a_run_the_card_says_so(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["push", str(tiny_model), "someone/model", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "were not at hand" in said and "license" not in said
    with pytest.raises(UserError, match=r"not the folder of a training run: config\.yaml is missing"):
        hub.model_card(tiny_model, "someone/model", run=tmp_path)


def test_mistakes(repositories: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"someone/else: no such folder here, and not to be had from the hub .*404"):
        MeDiM.from_pretrained("someone/else")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(
        UserError, match=r"runs/missing: no such model"
    ):  # a path, whose folder is here: nothing is asked
        MeDiM.from_pretrained("runs/missing")
    with pytest.raises(UserError, match="no such model"):
        hub.push_to_hub(tmp_path / "nothing", "someone/model")


def test_a_refusing_hub_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def create_repo(self, *_: Any, **__: Any) -> str:
            raise RuntimeError("401 Client Error:\nUnauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi", Refusing)
    with pytest.raises(UserError, match=r"someone/model: the hub refused .*401 Client Error: Unauthorized"):
        hub.push_to_hub(trained / "final", "someone/model")
