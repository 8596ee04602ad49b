"""The loop: schedules, checkpoints, and runs that are really killed, resumed and shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from medim.errors import UserError
from medim.training.loop import TrainOptions, learning_rate, make_optimizer
from medim.training.state import EMA, latest_checkpoint, load_checkpoint, prune, save_checkpoint, write_folder

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def config(folder: Path, model: Path, run: str, **train: object) -> list[str]:
    """Arguments of train.py for a few quick steps from `model`."""
    values = {"steps": 8, "batch_size": 4, "checkpoint_every": 3, "warmup": 2, "lr": 1e-3, **train}
    path = folder / f"{run}.yaml"
    lines = [f"run_dir: {folder / run}", f"init: {model}", f"data: {{path: {folder / 'data'}, studies: 12}}", "train:"]
    path.write_text("\n".join([*lines, *(f"  {key}: {value}" for key, value in values.items())]) + "\n")
    return [str(ROOT / "train.py"), str(path)]


def losses(folder: Path) -> dict[int, tuple[float, ...]]:
    """What metrics.jsonl says that a repetition must say again."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows}), "a step stands there twice"
    return {row["step"]: (row["loss"], row["loss_text"], row["loss_image"], row["grad_norm"]) for row in rows}


def run(*command: str, expect: int = 0) -> str:
    """Run a command from the root; returns stderr."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder with an uninterrupted run `whole` of 8 steps, its config and its data."""
    folder = tmp_path_factory.mktemp("runs")
    run(*config(folder, tiny_model, "whole"))
    return folder


def test_a_run_leaves_a_model_that_loads(whole: Path) -> None:
    from medim import MeDiM

    model = MeDiM.from_pretrained(whole / "whole" / "final")
    assert model.sample(task="pair", domain="xray", n=1)[0].image.size == (96, 96)
    assert sorted(losses(whole / "whole")) == list(range(1, 9))
    assert len(list((whole / "whole" / "checkpoints").iterdir())) == 2  # of 2 checkpoints, keep=2
    said = run(str(ROOT / "train.py"), str(whole / "whole.yaml"))
    assert "trained to the end already" in said


def test_killed_and_resumed_is_the_same_to_the_last_digit(whole: Path, tiny_model: Path) -> None:
    command = config(whole, tiny_model, "killed")
    process = subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    metrics = whole / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_text().count("\n") >= 5):
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')  # what a kill in the middle of a write leaves
    assert "resuming after step 3" in run(*command)
    assert losses(whole / "killed") == losses(whole / "whole")
    ends = [whole / name / "final" / "model.safetensors" for name in ("killed", "whole")]
    assert ends[0].read_bytes() == ends[1].read_bytes()


def test_sigterm_saves_and_exits_cleanly(whole: Path, tiny_model: Path) -> None:
    command = config(whole, tiny_model, "stopped", checkpoint_every=1000)
    metrics = whole / "stopped" / "metrics.jsonl"
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        while not (metrics.is_file() and metrics.read_text().count("\n") >= 2):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        assert process.stderr is not None and "stopped on request" in process.stderr.read()
        assert process.wait() == 0
    run(*command)
    assert losses(whole / "stopped") == losses(whole / "whole")


def test_two_processes_and_two_parts_give_the_losses_of_one(whole: Path, tiny_model: Path) -> None:
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29517"]
    run(*launch, *config(whole, tiny_model, "two"))
    run(*config(whole, tiny_model, "parts", accumulate=2, tensorboard=True))
    assert list((whole / "parts" / "tensorboard").glob("events.*"))
    for name in ("two", "parts"):
        for step, values in losses(whole / "whole").items():
            close = 5e-4 if step == 1 else 2e-2  # Adam blows up the rounding of gradients near zero
            assert losses(whole / name)[step] == pytest.approx(values, rel=close, abs=1e-5), (name, step)


def test_another_config_is_refused_and_nothing_is_lost(whole: Path) -> None:
    before = (whole / "whole" / "metrics.jsonl").read_text()
    said = run(str(ROOT / "train.py"), str(whole / "whole.yaml"), "train.lr=5e-4", expect=2)
    assert said.strip().splitlines()[-1].startswith("error:") and "another config" in said
    assert (whole / "whole" / "metrics.jsonl").read_text() == before


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(whole: Path, tiny_model: Path) -> None:
    said = run(*config(whole, tiny_model, "wild", lr=1e30, warmup=1), expect=2)
    assert "the loss is" in said.strip().splitlines()[-1] and "lower train.lr" in said and "Traceback" not in said


def test_learning_rate_rises_holds_and_falls() -> None:
    o = TrainOptions(steps=100, lr=1.0, warmup=10, decay_from=0.5)
    assert learning_rate(0, o) == pytest.approx(0.1) and learning_rate(9, o) == 1.0
    assert learning_rate(49, o) == 1.0 and learning_rate(75, o) == pytest.approx(0.5)
    assert learning_rate(99, o) == pytest.approx(0.02)


def test_optimizer_decays_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    groups = make_optimizer(model, TrainOptions()).param_groups
    assert [p.dim() for p in groups[0]["params"]] == [2] and groups[0]["weight_decay"] > 0
    assert all(p.dim() == 1 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0


def test_ema_of_constant_weights_is_their_value_and_else_follows_the_formula() -> None:
    model = nn.Linear(2, 2, bias=False)
    ema = EMA(model, 0.9)
    start = model.weight.detach().clone()
    ema.update(model, 10_000)
    torch.testing.assert_close(ema.weights["weight"], start)
    with torch.no_grad():
        model.weight.add_(1.0)
    ema.update(model, 10_000)
    torch.testing.assert_close(ema.weights["weight"], start + 0.1)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.ones(1, 2)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_checkpoint_round_trip_is_bitwise_and_torn_ones_are_skipped(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def build() -> tuple[nn.Linear, torch.optim.Optimizer, EMA]:
        model = nn.Linear(2, 2)
        return model, make_optimizer(model, TrainOptions()), EMA(model, 0.9)

    model, optimizer, ema = build()
    _step(model, optimizer)
    ema.update(model, 1)

    def save_model(folder: Path) -> None:
        folder.mkdir()
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")

    save_checkpoint(tmp_path / "step-00000001", 1, save_model, model, optimizer, ema, {})
    (tmp_path / "step-00000002").mkdir()
    with pytest.warns(UserWarning, match="incomplete"):
        found = latest_checkpoint(tmp_path)
    assert found == tmp_path / "step-00000001"
    other, other_optimizer, other_ema = build()
    assert load_checkpoint(found, other, other_optimizer, other_ema)["step"] == 1
    for m, o in ((model, optimizer), (other, other_optimizer)):
        _step(m, o)
    assert torch.equal(model.weight, other.weight) and torch.equal(ema.weights["weight"], other_ema.weights["weight"])
    (tmp_path / "step-00000002").rmdir()
    save_checkpoint(tmp_path / "step-00000003", 3, save_model, model, optimizer, ema, {})
    prune(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("kept")

    def fill(aside: Path) -> None:
        (aside / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_folder(tmp_path / "final", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "old").read_text() == "kept"
