"""Runs that are killed at any instant, also while they save, end where an undisturbed one ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.distributed


def wait_for(process: subprocess.Popen[str], happened: Callable[[], bool]) -> bool:
    """Wait until it happens; False if the process ended first."""
    deadline = time.monotonic() + 180
    while process.poll() is None:
        assert time.monotonic() < deadline
        if happened():
            return True
        time.sleep(0.002)
    return False


def kill(process: subprocess.Popen[str]) -> None:
    """The whole group, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_somewhere(runs: Any, command: list[str], run_dir: Path, chance: random.Random) -> bool:
    """Start, and kill in the middle of a save or anywhere in training; False if the run had ended before."""
    process = runs.start(*command)
    metrics, folder = run_dir / "metrics.jsonl", run_dir / "checkpoints"
    before = metrics.read_bytes() if metrics.is_file() else b""
    if chance.random() < 0.5:
        happened = wait_for(process, lambda: any(folder.glob(".*.partial")))
        time.sleep(chance.uniform(0, 0.02))
    else:
        happened = wait_for(process, lambda: metrics.is_file() and metrics.read_bytes() != before)
        time.sleep(chance.uniform(0, 1.5))
    if happened and process.poll() is None:
        kill(process)
        return True
    process.communicate()
    return False


def harness(runs: Any, name: str, engine: str, processes: int, kills: int) -> None:
    """Kill a run so often, let it end, and start it over from nothing as often as it ends before."""
    chance, done = random.Random(name), 0
    command = runs.command(name, engine, processes)
    while done < kills:
        if kill_somewhere(runs, command, runs.folder / name, chance):
            done += 1
        else:
            (runs.folder / name).rename(runs.folder / f"{name}-{done}")
    runs.run(name, engine, processes)


@pytest.mark.parametrize("kills", [1, pytest.param(20, marks=pytest.mark.slow)])
def test_one_process_bit_for_bit(kills: int, make_runs: Callable[..., Any]) -> None:
    runs = make_runs(train__steps=24, train__batch_size=2, train__checkpoint_every=2)
    runs.run("whole")
    harness(runs, "killed", "", 1, kills)
    assert runs.losses("killed") == runs.losses("whole")
    for key, value in runs.weights("whole").items():
        assert torch.equal(runs.weights("killed")[key], value), key


@pytest.mark.parametrize(
    ("engine", "kills"),
    [("zero3", 1), *(pytest.param(e, 20, marks=pytest.mark.slow) for e in ("cpu", "zero2", "zero3", "fsdp2"))],
)
def test_two_processes(engine: str, kills: int, make_runs: Callable[..., Any]) -> None:
    runs = make_runs(train__steps=24, train__batch_size=2, train__checkpoint_every=2)
    runs.run("whole", engine, 2)
    harness(runs, "killed", engine, 2, kills)
    runs.compare("killed", "whole", 1e-6)


@pytest.mark.parametrize(
    ("engine", "number"),
    [
        ("", signal.SIGTERM),
        ("zero2", signal.SIGUSR1),
        pytest.param("", signal.SIGUSR1, marks=pytest.mark.slow),
        pytest.param("zero2", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_asked_to_stop_it_saves_and_exits_with_0(
    engine: str, number: signal.Signals, make_runs: Callable[..., Any]
) -> None:
    runs = make_runs(train__steps=400, train__batch_size=2, train__checkpoint_every=1000)
    process = runs.start(*runs.command("stopped", engine, 2 if engine else 1))
    metrics = runs.folder / "stopped" / "metrics.jsonl"
    assert wait_for(process, lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
    if engine:  # one of the ranks only: the others must agree
        os.kill(rank_of(process, 1).pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    assert "stopped on request; saved after step" in said
    (saved,) = (runs.folder / "stopped" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step-")) == len(runs.losses("stopped"))


def rank_of(launcher: subprocess.Popen[str], rank: int) -> Any:
    """The process of a rank, among the launcher's children."""
    import psutil

    for child in psutil.Process(launcher.pid).children(recursive=True):
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError("no such rank")


@pytest.mark.parametrize("engine", ["cpu", pytest.param("zero3", marks=pytest.mark.slow)])
@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_the_others_name_the_one_that_died(engine: str, rank: int, make_runs: Callable[..., Any]) -> None:
    runs = make_runs(train__steps=2000, train__batch_size=2, train__checkpoint_every=3)
    process = runs.start(*runs.command("orphan", engine, 2))
    assert wait_for(process, lambda: any((runs.folder / "orphan" / "checkpoints").glob("step-*")))
    rank_of(process, rank).kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"error: rank {rank} on" in said and "; the last good checkpoint is " in said


STANDINS = {
    "srun": 'shift; exec "$@"',
    "scancel": 'pkill -USR1 -f "train.py.*queued"',  # all processes of the step, launchers too
    "scontrol": '[ "$1" = show ] && echo 127.0.0.1 || echo "back into the queue: $2"',
}


def test_the_slurm_script_saves_and_goes_back_into_the_queue(make_runs: Callable[..., Any]) -> None:
    runs = make_runs(train__steps=2000, train__batch_size=2, train__checkpoint_every=1000)
    for name, body in STANDINS.items():
        (runs.folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (runs.folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "here", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    here = {
        "PYTHON": sys.executable,
        "ENGINE": "cpu",
        "GPUS": "2",
        "PORT": "29533",
        "PATH": f"{runs.folder}:{os.environ['PATH']}",
    }
    process = runs.start("bash", "configs/slurm/train.sbatch", *runs.command("queued")[2:], **slurm, **here)
    metrics = runs.folder / "queued" / "metrics.jsonl"
    assert wait_for(process, lambda: metrics.is_file() and metrics.read_text().count("\n") >= 3)
    process.send_signal(signal.SIGUSR1)
    written, said = process.communicate(timeout=120)
    assert process.returncode == 0, said[-3000:]
    assert "stopped on request" in said and "back into the queue: 7" in written
    assert len(list((runs.folder / "queued" / "checkpoints").iterdir())) == 1
