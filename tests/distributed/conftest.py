"""Real runs of train.py on the shipped demo model, in one process or in several that `accelerate launch` starts.

At 48 pixels, so that a step is short.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
STEPS = 20
# Adam divides gradients that are next to nothing, of which few codes leave more, by next to nothing: a larger eps
SETTINGS = {"data.studies": 64, "resolution": 48, "train.precision": "fp32", "train.eps": 1e-6}


def free_port() -> str:
    """One that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@dataclass
class Runs:
    """A folder of runs that share their data.

    Attributes:
        settings: overrides of configs/train/demo.yaml for all of them.
    """

    folder: Path
    settings: dict[str, Any] = field(default_factory=dict)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    def command(self, name: str, engine: str = "", processes: int = 1, **overrides: Any) -> list[str]:
        """The command line of a run; `engine` names a file in configs/accelerate."""
        launch = [sys.executable]
        if engine:
            launch += ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{engine}.yaml"]
            launch += ["--num_processes", str(processes), "--main_process_port", free_port()]
        values = {**self.settings, "run_dir": self.folder / name, "data.path": self.folder / "data"}
        values |= {key.replace("__", "."): value for key, value in overrides.items()}
        return [*launch, "train.py", "configs/train/demo.yaml", *(f"{key}={value}" for key, value in values.items())]

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """Start a command at the head of a process group of its own."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**ENVIRONMENT, **environment},
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def end(self) -> None:
        """Kill what a failed test left running."""
        for process in self.started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()

    def run(self, name: str, engine: str = "", processes: int = 1, expect: int = 0, **overrides: Any) -> str:
        """Run to the end; returns stderr."""
        process = self.start(*self.command(name, engine, processes, **overrides))
        _, said = process.communicate(timeout=600)
        assert process.returncode == expect, said[-4000:]
        return said

    def fork(self, name: str, new: str, step: int) -> None:
        """Make `new` what `name` was after `step`."""
        (self.folder / new / "checkpoints").mkdir(parents=True)
        for part in (f"checkpoints/step-{step:08d}", "config.yaml", "metrics.jsonl", "validation.jsonl"):
            copy = shutil.copytree if (self.folder / name / part).is_dir() else shutil.copy
            copy(self.folder / name / part, self.folder / new / part)

    def losses(self, name: str) -> list[float]:
        """Of every step, in order."""
        rows = [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
        return [row["loss"] for row in rows]

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of the exported model."""
        return load_file(self.folder / name / "final" / "model.safetensors")

    def validated(self, name: str) -> list[dict[str, float]]:
        """The lines of its validations."""
        return [json.loads(line) for line in (self.folder / name / "validation.jsonl").read_text().splitlines()]

    def compare(self, name: str, with_: str, tolerance: float) -> None:
        """Losses of all steps and final weights."""
        assert self.losses(name) == pytest.approx(self.losses(with_), abs=tolerance, rel=0)
        ours, theirs = self.weights(name), self.weights(with_)
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def make_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Runs]]:
    """Makes folders of runs."""
    made: list[Runs] = []

    def make(**settings: Any) -> Runs:
        keys = {key.replace("__", "."): value for key, value in settings.items()}
        made.append(Runs(tmp_path_factory.mktemp("runs"), {**SETTINGS, **keys}))
        return made[-1]

    yield make
    for runs in made:
        runs.end()


@pytest.fixture(scope="module")
def runs(make_runs: Callable[..., Runs]) -> Runs:
    """Runs of 20 steps of 4 studies with a checkpoint at half; `one` is that of one process."""
    settings = {"validation__every": STEPS // 2, "validation__studies": 10, "validation__batch_size": 4}
    runs = make_runs(train__steps=STEPS, train__batch_size=4, train__checkpoint_every=STEPS // 2, **settings)
    runs.run("one")
    return runs
