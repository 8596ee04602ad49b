"""The loop: schedules, checkpoints, and runs that are really killed, resumed and shared by processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from medim.errors import UserError
from medim.training.checkpoint import Checkpoint, export, save
from medim.training.engine import EMA, Engine
from medim.training.folders import latest_checkpoint, prune, write_folder
from medim.training.loop import TrainOptions, learning_rate
from medim.training.optimizer import make_optimizer

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def config(folder: Path, model: Path, run: str, **train: object) -> list[str]:
    """Arguments of train.py for a few quick steps from `model`."""
    values = {"steps": 8, "batch_size": 4, "checkpoint_every": 3, "warmup": 2, "lr": 1e-3, "precision": "fp32", **train}
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
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    said = run(*launch, "--main_process_port", "29517", *config(whole, tiny_model, "two"))
    assert "2 processes, DDP: 4 rows a step, 2 at a time each" in said
    run(*config(whole, tiny_model, "parts", accumulate=2), "log.tensorboard=true")
    assert list((whole / "parts" / "tensorboard").glob("events.*"))
    for name in ("two", "parts"):
        for step, values in losses(whole / "whole").items():
            close = 5e-4 if step == 1 else 2e-2  # Adam blows up the rounding of gradients near zero
            assert losses(whole / name)[step] == pytest.approx(values, rel=close, abs=1e-5), (name, step)


def test_a_change_that_spoils_the_run_is_refused_with_what_differs(whole: Path, tiny_model: Path) -> None:
    command = config(whole, tiny_model, "changed", steps=5)
    run(*command)
    before = (whole / "changed" / "metrics.jsonl").read_text()
    said = run(*command, "train.lr=5e-4", "objective.condition_dropout=0.5", expect=2)
    assert "Traceback" not in said and "train.lr: 0.001, now 0.0005" in said
    assert "objective.condition_dropout: 0.1, now 0.5" in said
    said = run(*command, "train.steps=9", expect=2)
    assert "train.steps: 5, now 9" in said, "the rate was falling already"
    assert (whole / "changed" / "metrics.jsonl").read_text() == before


def test_a_change_that_spoils_nothing_is_told_and_taken(whole: Path, tiny_model: Path) -> None:
    command = config(whole, tiny_model, "longer", decay_from=1.0, steps=4)
    run(*command)
    said = run(*command, "train.steps=6", "train.keep=3", "train.accumulate=2")
    assert "train.steps: 4, now 6" in said and "train.keep: 2, now 3" in said
    run(*config(whole, tiny_model, "long", decay_from=1.0, steps=6))
    for step, values in losses(whole / "long").items():
        assert losses(whole / "longer")[step] == pytest.approx(values, rel=1e-4), step


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(whole: Path, tiny_model: Path) -> None:
    said = run(*config(whole, tiny_model, "wild", lr=1e30, warmup=1), expect=2)
    assert "the loss is" in said.strip().splitlines()[-1] and "lower train.lr" in said and "Traceback" not in said


def test_moments_in_8_bits_go_on_bit_for_bit(whole: Path, tiny_model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"optimizer": "adamw_8bit", "decay_from": 1.0}
    for name in ("bits", "bits-again"):
        run(*config(whole, tiny_model, name, **settings, steps=3 if name == "bits" else 6))
    run(*config(whole, tiny_model, "bits", **settings, steps=6))
    assert losses(whole / "bits") == losses(whole / "bits-again")


def test_muon_goes_on_bit_for_bit_and_shares_by_ddp_only(whole: Path, tiny_model: Path) -> None:
    settings = {"optimizer": "muon", "decay_from": 1.0}
    run(*config(whole, tiny_model, "muon", **settings, steps=3))
    found = latest_checkpoint(whole / "muon" / "checkpoints", Checkpoint)
    assert found is not None and {"exp_avg", "exp_avg_sq", "momentum_buffer"} < set(Checkpoint(found).fields)
    run(*config(whole, tiny_model, "muon", **settings, steps=6))
    run(*config(whole, tiny_model, "muon-again", **settings, steps=6))
    assert losses(whole / "muon") == losses(whole / "muon-again") != losses(whole / "whole")
    launch = ["-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp2.yaml"]
    launch += ["--num_processes", "2", "--main_process_port", "29518"]
    said = run(*launch, *config(whole, tiny_model, "muon-shared", **settings, steps=3), expect=1)
    assert "train.optimizer=muon: not with FSDP2, only on one GPU or DDP" in said


def test_learning_rate_rises_holds_and_falls() -> None:
    o = TrainOptions(steps=100, lr=1.0, warmup=10, decay_from=0.5)
    assert learning_rate(0, o) == pytest.approx(0.1) and learning_rate(9, o) == 1.0
    assert learning_rate(49, o) == 1.0 and learning_rate(75, o) == pytest.approx(0.5)
    assert learning_rate(99, o) == pytest.approx(0.02)


class Small:
    """A network of one layer, held as one process holds it, and its average."""

    def __init__(self, decay: float = 0.9) -> None:
        self.network = nn.Linear(2, 2)
        self.engine = Engine(Accelerator(cpu=True), self.network, 1.0)
        self.engine.hold(lambda network: make_optimizer(network, TrainOptions()))
        self.ema = EMA(self.engine, decay)

    def step(self) -> None:
        self.engine.backward(self.network(torch.ones(1, 2)).square().sum(), True)
        self.engine.step()

    def save(self, folder: Path, step: int) -> None:
        extra = {"config": {}, "identity": {}}
        save(folder / f"step-{step:08d}", step, self.engine, self.ema, lambda model: model.mkdir(), extra)


def test_ema_of_constant_weights_is_their_value_and_else_follows_the_formula() -> None:
    small = Small()
    start = small.network.weight.detach().clone()
    small.ema.update(10_000)
    torch.testing.assert_close(small.ema.weights["weight"].view(2, 2), start)
    with torch.no_grad():
        small.network.weight.add_(1.0)
    small.ema.update(10_000)
    torch.testing.assert_close(small.ema.weights["weight"].view(2, 2), start + 0.1)
    with small.ema.in_place():
        torch.testing.assert_close(small.network.weight.detach(), start + 0.1)
    torch.testing.assert_close(small.network.weight.detach(), start + 1)


def test_checkpoint_round_trip_is_bitwise_and_torn_ones_are_skipped(tmp_path: Path) -> None:
    small = Small()
    small.step()
    small.ema.update(1)
    small.save(tmp_path, 1)
    (tmp_path / "step-00000002").mkdir()
    with pytest.warns(UserWarning, match="incomplete"):
        found = latest_checkpoint(tmp_path, Checkpoint)
    assert found == tmp_path / "step-00000001"
    other = Small()
    assert Checkpoint(found).restore(other.engine, other.ema) == 1
    for one in (small, other):
        one.step()
        one.ema.update(2)
    assert torch.equal(small.network.weight, other.network.weight)
    assert torch.equal(small.network.bias, other.network.bias)
    assert all(torch.equal(value, other.ema.weights[name]) for name, value in small.ema.weights.items())


def test_a_checkpoint_cut_short_is_skipped(tmp_path: Path) -> None:
    small = Small()
    small.save(tmp_path, 1)
    small.save(tmp_path, 2)
    path = tmp_path / "step-00000002" / "rank-00000-of-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.warns(UserWarning, match="broken checkpoint"):
        assert latest_checkpoint(tmp_path, Checkpoint) == tmp_path / "step-00000001"


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    small = Small()
    small.save(tmp_path, 1)
    other = Small()
    other.engine.pieces["weight"] = replace(other.engine.pieces["weight"], shape=torch.Size([4]))
    with pytest.raises(UserError, match=r"weight is \[2, 2\], wanted \[4\]"):
        Checkpoint(tmp_path / "step-00000001").restore(other.engine, other.ema)
    other.engine.inner = nn.Linear(2, 2, bias=False)
    with pytest.raises(UserError, match="not a checkpoint of this model: 1 names differ, bias"):
        Checkpoint(tmp_path / "step-00000001").restore(other.engine, other.ema)


def test_export_writes_the_average_or_the_last_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    small = Small()
    small.step()
    small.ema.update(100)
    small.save(tmp_path, 1)
    for field, wanted in (("weight", small.network.weight), ("ema", small.ema.weights["weight"].view(2, 2))):
        written = load_file(export(tmp_path / "step-00000001", tmp_path / field, field) / "model.safetensors")
        assert torch.equal(written["weight"], wanted)
    half = export(tmp_path / "step-00000001", tmp_path / "half", dtype=torch.bfloat16)
    assert load_file(half / "model.safetensors")["bias"].dtype == torch.bfloat16


def test_the_newest_checkpoints_stay_and_every_so_manieth(tmp_path: Path) -> None:
    for step in range(1, 10):
        (tmp_path / f"step-{step:08d}").mkdir()
    prune(tmp_path, keep=2, keep_every=3)
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [3, 6, 8, 9]


def test_a_disk_that_is_full_while_saving_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    small = Small()
    small.save(tmp_path, 1)

    def fill(model: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"No space left on device.*earlier checkpoints are whole"):
        save(tmp_path / "step-00000002", 2, small.engine, small.ema, fill, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    Checkpoint(tmp_path / "step-00000001")


def test_a_full_disk_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "old").write_text("kept")

    def fill(aside: Path) -> None:
        (aside / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_folder(tmp_path / "final", fill)
    assert [p.name for p in tmp_path.iterdir()] == ["final"] and (tmp_path / "final" / "old").read_text() == "kept"
