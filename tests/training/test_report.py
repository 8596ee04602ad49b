"""What a run writes: lines that a repetition repeats, spikes with their studies, no loss that is no number."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from accelerate import Accelerator

from medim.errors import UserError
from medim.objective import T_BINS, Loss
from medim.training.report import Log, LogOptions, Meter, Throughput, by_noise, drop_after, read_rows
from medim.vocabulary import KINDS


def made(total: float) -> Loss:
    cells = torch.zeros(len(KINDS), T_BINS)
    cells[0, 3], cells[1, 9] = 2.0, 8.0
    return Loss(torch.tensor(total), cells, cells / 2, torch.zeros(()), torch.zeros(2))


@pytest.fixture
def meter(tmp_path: Path) -> Meter:
    o = LogOptions(spike=3.0)
    log = Log(tmp_path, 0, 40, o, enabled=True)
    throughput = Throughput(Accelerator(cpu=True), peak=1e6)
    return Meter(log, throughput, o, 4, lambda step: [f"study-{step}-{n}" for n in range(2)], lambda: "step-3 is whole")


def test_a_line_has_means_over_the_steps_since_the_last(meter: Meter, tmp_path: Path) -> None:
    for total in (1.0, 2.0, 6.0):
        meter.add(made(total))
        meter.throughput.add(tokens=100.0, flops=2e4, waited=0.0)
    meter.write(3, torch.tensor(0.5), 1e-3)
    (row,) = read_rows(tmp_path / "metrics.jsonl")
    assert row["loss"] == 3.0 and row["step"] == 3 and row["grad_norm"] == 0.5 and row["lr"] == 1e-3
    assert row["loss_text"] == row["loss_image"] == 2.0
    assert row["loss_text_by_t"][3] == 2.0 and row["loss_text_by_t"].count(None) == T_BINS - 1
    seconds = 3 * 4 / row["samples_per_s"]
    assert row["tokens_per_s"] == pytest.approx(300 / seconds, rel=1e-2)
    assert row["mfu"] == pytest.approx(6e4 / 1e6 / seconds, rel=1e-2)
    assert row["eta_s"] == pytest.approx(seconds * 37 / 3, rel=1e-2)
    assert 0 <= row["data_wait"] <= 1 and row["memory_gib"] > 0


def test_a_loss_that_is_no_number_names_its_step_its_studies_and_the_last_checkpoint(meter: Meter) -> None:
    for total in (1.0, float("nan"), 2.0):
        meter.add(made(total))
    with pytest.raises(UserError, match=r"step 2: the loss is nan; step-3 is whole.*of the step: study-1-0, st"):
        meter.write(3, torch.tensor(1.0), 1.0)


def test_spikes_are_kept_with_their_studies(meter: Meter, tmp_path: Path) -> None:
    for step, total in enumerate([1.0] * 12 + [2.9, 3.1, 1.0], start=1):
        meter.add(made(total))
        meter.write(step, torch.tensor(1.0), 1.0)
    (spike,) = read_rows(tmp_path / "spikes.jsonl")
    assert spike["step"] == 14 and spike["loss"] == pytest.approx(3.1) and spike["median"] == 1.0
    assert spike["studies"] == ["study-13-0", "study-13-1"]


def test_lines_of_steps_that_are_done_again_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)) + '{"step": 6, "lo')
    drop_after(path, 3)
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_no_terminal_gets_plain_lines_and_no_bar(meter: Meter, capsys: pytest.CaptureFixture[str]) -> None:
    for step in range(1, 41):
        meter.add(made(1.0))
        meter.write(step, torch.tensor(1.0), 1.0)
    said = capsys.readouterr().err
    assert [line.split(":")[0] for line in said.splitlines()] == ["step 1/40", "step 40/40"] and "\r" not in said


def test_by_noise_counts_what_was_not_drawn_as_none() -> None:
    row = by_noise(made(1.0).nats, made(1.0).positions)
    assert row["loss_image_by_t"] == [None] * 9 + [2.0]
    found = made(1.0)
    nothing = by_noise(torch.zeros_like(found.nats), torch.zeros_like(found.positions))
    assert nothing["loss_text"] is None and nothing["loss_image_by_t"] == [None] * T_BINS


def test_trackers_get_numbers_and_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Accelerator(cpu=True)
    log = Log(tmp_path, 0, 2, LogOptions(tensorboard=True), enabled=True)
    log.write({"step": 1, "loss": 2.5, "loss_text_by_t": [None]})
    log.track({"step": 1, "loss": 1.5}, "validation/")
    log.picture(1, PIL.Image.new("RGB", (8, 6)))
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {name: events.Scalars(name)[0].value for name in events.Tags()["scalars"]} == {
        "loss": 2.5,
        "validation/loss": 1.5,
    }
    assert events.Tags()["images"] and (tmp_path / "pictures" / "step-00000001.png").is_file()


def test_wandb_writes_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    Accelerator(cpu=True)
    log = Log(tmp_path, 0, 2, LogOptions(wandb=True), enabled=True)
    log.write({"step": 1, "loss": 2.5})
    log.picture(1, PIL.Image.new("RGB", (8, 6)))
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_that_is_not_installed_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, name, None)
    Accelerator(cpu=True)
    with pytest.raises(UserError, match=rf"log.{name}: the package is not installed.*pip install {name}"):
        Log(tmp_path, 0, 2, LogOptions(**{name: True}), enabled=True)
