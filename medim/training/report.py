"""What a run says while it goes: a progress bar or plain lines, `metrics.jsonl`, and trackers that are asked for."""

from __future__ import annotations

import json
import os
import resource
import statistics
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from pydantic import Field
from tqdm import tqdm

from medim.config import options
from medim.errors import UserError
from medim.objective import BESIDE, T_BINS, Loss
from medim.vocabulary import KINDS

PLAIN_EVERY = 30.0  # seconds between lines where stderr is no terminal
REMEMBERED = 50  # logged losses that a spike is measured against


@options
class LogOptions:
    """What is written, where, and how often.

    Attributes:
        every: steps between lines of `metrics.jsonl`; a line has means over them.
        tensorboard, wandb, trackio: trackers to write to besides; wandb and trackio are packages of their own.
        project: of the trackers; a run there is named after `run_dir`.
        pictures: steps between contact sheets of the same pairs, drawn with the averaged weights; 0: none.
        spike: a loss so many times the median of the last 50 is written to `spikes.jsonl` with its studies; 0: none.
    """

    every: Annotated[int, Field(ge=1)] = 1
    tensorboard: bool = False
    wandb: bool = False
    trackio: bool = False
    project: str = "medim"
    pictures: Annotated[int, Field(ge=0)] = 0
    spike: Annotated[float, Field(ge=0)] = 3.0


class Log:
    """Lines of a file, a bar or plain lines on stderr, and trackers; lines after the step resumed from are dropped.

    Only the first process writes.
    """

    def __init__(self, run_dir: Path, first: int, steps: int, o: LogOptions, *, enabled: bool) -> None:
        self.run_dir, self.steps, self.enabled = run_dir, steps, enabled
        self.path = run_dir / "metrics.jsonl"
        self.trackers: list[Any] = []
        if not enabled:
            return
        drop_after(self.path, first)
        self.trackers = [_tracker(name, run_dir, o) for name in ("tensorboard", "wandb", "trackio") if getattr(o, name)]
        self.terminal = sys.stderr.isatty()
        self.said = 0.0
        quiet = not self.terminal
        self.bar = tqdm(
            total=steps, initial=first, desc="training", unit="step", mininterval=1, smoothing=0.1, disable=quiet
        )

    def write(self, row: Mapping[str, Any], shown: Mapping[str, str] | None = None) -> None:
        """One more line; `shown` is what a reader wants to see while it runs."""
        if not self.enabled:
            return
        append(self.path, row)
        self.track(row)
        if shown is None:
            return
        step = int(row["step"])
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if not self.terminal and (now - self.said >= PLAIN_EVERY or step == self.steps):
            self.said = now
            print(f"step {step}/{self.steps}: " + ", ".join(f"{k} {v}" for k, v in shown.items()), file=sys.stderr)

    def track(self, row: Mapping[str, Any], prefix: str = "") -> None:
        """Give the numbers of a row to the trackers."""
        numbers = {prefix + key: value for key, value in row.items() if isinstance(value, int | float)}
        for tracker in self.trackers:
            tracker.log({key: value for key, value in numbers.items() if key != prefix + "step"}, step=int(row["step"]))

    def picture(self, step: int, sheet: PIL.Image.Image) -> None:
        """Keep a contact sheet."""
        if not self.enabled:
            return
        folder = self.run_dir / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        sheet.save(folder / f"step-{step:08d}.png")
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({"pairs": np.asarray(sheet)[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({"pairs": [sheet]}, step=step)

    def close(self) -> None:
        """End the bar's line and the trackers."""
        if self.enabled:
            self.bar.close()
            for tracker in self.trackers:
                tracker.finish()


def append(path: Path, row: Mapping[str, Any]) -> None:
    """One more line of a JSON-lines file."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a JSON-lines file, without one that a kill cut short."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def drop_after(path: Path, step: int) -> None:
    """Remove the lines of later steps, which will be done again."""
    if not path.is_file():
        return
    aside = path.with_suffix(".partial")
    aside.write_text("".join(json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step))
    os.replace(aside, path)


def _tracker(name: str, run_dir: Path, o: LogOptions) -> Any:
    """One of accelerate's trackers, started; a run that goes on goes on there too.

    Raises:
        UserError: its package is not installed.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    settings: dict[str, Any] = {"name": run_dir.name}
    if name == "tensorboard":
        project, settings = "tensorboard", {"logging_dir": str(run_dir)}
    elif name == "wandb":
        mark = zlib.crc32(str(run_dir.absolute()).encode())
        project, settings = o.project, settings | {"dir": str(run_dir), "id": f"{mark:08x}", "resume": "allow"}
    else:
        project, settings = o.project, settings | {"resume": "allow"}
    try:
        tracker = LOGGER_TYPE_TO_CLASS[name](project, **settings)
        tracker.start()
    except ImportError as error:
        raise UserError(f"log.{name}: the package is not installed or incomplete: pip install {name}") from error
    return tracker


class Throughput:
    """What was done since the last line, summed on each process without waiting for its device.

    Args:
        peak: FLOP/s of one device, if known: then MFU is the FLOPs that the mathematics needs (`medim.model.flops`: no
            padding, nothing twice; a multiply-add is two) over what all devices could do meanwhile (Chowdhery et al.
            2022, arXiv 2204.02311, appendix B).
    """

    def __init__(self, accelerator: Accelerator, peak: float | None) -> None:
        self.accelerator, self.peak = accelerator, peak
        self.reset()

    def reset(self) -> None:
        """Count from now."""
        self.tokens = self.flops = self.waited = 0.0
        self.began = time.perf_counter()

    def add(self, tokens: float, flops: float, waited: float) -> None:
        """A step of this process: positions without padding, FLOPs needed, seconds spent waiting for data."""
        self.tokens, self.flops, self.waited = self.tokens + tokens, self.flops + flops, self.waited + waited

    def row(self, samples: int, left: float) -> dict[str, float]:
        """Figures of all processes since the last call, for `samples` done; `left` is the steps left by those done."""
        world, spent = self.accelerator.num_processes, max(time.perf_counter() - self.began, 1e-9)
        sums = torch.tensor([self.tokens, self.flops, self.waited], dtype=torch.float64)
        device = self.accelerator.device
        sums = sums.float() if device.type == "mps" else sums
        tokens, flops, waited = self.accelerator.reduce(sums.to(device), "sum").tolist()
        memory = self.accelerator.gather(torch.tensor([_memory_gib()], device=device)).max().item()
        row = {"samples_per_s": samples / spent, "tokens_per_s": tokens / spent}
        if self.peak is not None:
            row["mfu"] = flops / (spent * world * self.peak)
        row |= {"data_wait": waited / (spent * world), "memory_gib": memory, "eta_s": left * spent}
        self.reset()
        return {name: float(f"{value:.4g}") for name, value in row.items()}


class Meter:
    """The log of a diffusion run.

    Args:
        studies: the ids of a step's studies, asked for only when something is wrong with it.
        checkpoint: the last complete checkpoint, for messages.
    """

    def __init__(
        self,
        log: Log,
        throughput: Throughput,
        o: LogOptions,
        batch_size: int,
        studies: Callable[[int], Sequence[str]],
        checkpoint: Callable[[], str],
    ) -> None:
        self.log, self.throughput, self.o, self.batch_size = log, throughput, o, batch_size
        self.studies, self.checkpoint = studies, checkpoint
        earlier = [row["loss"] for row in read_rows(log.path) if "loss" in row]
        self.recent = deque(earlier[-REMEMBERED:], maxlen=REMEMBERED)
        self.window: list[Loss] = []

    def add(self, loss: Loss) -> None:
        """This process's share of a step; nothing waits for the device."""
        self.window.append(loss)

    def write(self, step: int, norm: torch.Tensor, lr: float) -> None:
        """A line for the steps since the last one; all processes call it.

        Raises:
            UserError: a loss among them is no number.
        """
        first = step - len(self.window) + 1
        totals = self.throughput.accelerator.reduce(torch.stack([one.total for one in self.window]), "sum")
        nats, positions = (
            self.throughput.accelerator.reduce(torch.stack([getattr(one, name) for one in self.window]).sum(0), "sum")
            for name in ("nats", "positions")
        )
        self._check_finite(first, totals.tolist())
        row: dict[str, Any] = {"step": step, "loss": round(float(totals.mean()), 6)}
        beside = self.throughput.accelerator.reduce(torch.stack([one.parts for one in self.window]).mean(0), "sum")
        row |= {f"loss_{name}": round(v, 6) for name, v in zip(BESIDE, beside.tolist(), strict=True) if v}
        row |= by_noise(nats.cpu(), positions.cpu()) | {"grad_norm": round(float(norm), 6), "lr": lr}
        row |= self.throughput.row(len(totals) * self.batch_size, (self.log.steps - step) / len(totals))
        shown = {f"loss {kind}": "-" if (v := row[f"loss_{kind}"]) is None else f"{v:.3f}" for kind in KINDS}
        shown |= {"samples/s": f"{row['samples_per_s']:.0f}", "left": _clock(row["eta_s"])}
        if "mfu" in row:
            shown["MFU"] = f"{row['mfu']:.1%}"
        self.log.write(row, shown)
        self._note_spikes(first, totals.tolist())
        self.window = []

    def _check_finite(self, first: int, totals: Sequence[float]) -> None:
        for step, total in enumerate(totals, start=first):
            if not np.isfinite(total):
                studies = ", ".join(self.studies(step - 1))
                raise UserError(
                    f"step {step}: the loss is {total}; {self.checkpoint()}; lower train.lr in a new run_dir, with "
                    f"init= that checkpoint; studies of the step: {studies}"
                )

    def _note_spikes(self, first: int, totals: Sequence[float]) -> None:
        for step, total in enumerate(totals, start=first):
            middle = statistics.median(self.recent) if len(self.recent) >= 10 else float("inf")
            if self.o.spike and total > self.o.spike * middle and self.log.enabled:
                row = {"step": step, "loss": total, "median": middle, "studies": list(self.studies(step - 1))}
                append(self.log.run_dir / "spikes.jsonl", row)
            self.recent.append(total)


def by_noise(nats: torch.Tensor, positions: torch.Tensor) -> dict[str, Any]:
    """Mean loss of each kind, in nats a masked position, over all and by noise level; None where there was none."""
    row: dict[str, Any] = {}
    for number, kind in enumerate(KINDS):
        some = positions[number].sum()
        row[f"loss_{kind}"] = round(float(nats[number].sum() / some), 6) if some > 0 else None
        bins = (nats[number] / positions[number].clamp(min=1)).tolist()
        row[f"loss_{kind}_by_t"] = [round(bins[b], 4) if positions[number, b] > 0 else None for b in range(T_BINS)]
    return row


def _clock(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"


def _memory_gib() -> float:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
