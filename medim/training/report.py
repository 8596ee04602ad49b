"""What a run says while it goes: a progress bar, `metrics.jsonl`, TensorBoard if asked for."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from medim.objective import T_BINS, Loss
from medim.vocabulary import KINDS


class Meter:
    """Writes one line a logged step; lines after the step that is resumed from are dropped."""

    def __init__(
        self, run_dir: Path, first: int, steps: int, batch_size: int, *, enabled: bool, tensorboard: bool
    ) -> None:
        self.enabled, self.batch_size, self.previous = enabled, batch_size, first
        self.began = time.perf_counter()
        if not enabled:
            return
        self.path = run_dir / "metrics.jsonl"
        self._drop_after(first)
        self.bar = tqdm(total=steps, initial=first, desc="training", unit="step", mininterval=1, smoothing=0.1)
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(run_dir / "tensorboard"))

    def _drop_after(self, step: int) -> None:
        if not self.path.is_file():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except ValueError:
                continue  # the torn last line of a killed run
        aside = self.path.with_suffix(".partial")
        aside.write_text("".join(kept))
        os.replace(aside, self.path)

    def log(self, step: int, loss: Loss, norm: torch.Tensor, lr: float) -> None:
        """Write the figures of one step, and move the bar to it."""
        if not self.enabled:
            return
        now = time.perf_counter()
        rate = (step - self.previous) * self.batch_size / max(now - self.began, 1e-9)
        self.began, self.previous = now, step
        nats, positions = loss.nats.cpu(), loss.positions.cpu()
        row: dict[str, Any] = {"step": step, "loss": round(float(loss.total), 6)}
        for number, kind in enumerate(KINDS):
            row[f"loss_{kind}"] = round(float(nats[number].sum() / positions[number].sum().clamp(min=1)), 6)
            bins = (nats[number] / positions[number].clamp(min=1)).tolist()
            row[f"loss_{kind}_by_t"] = [round(bins[b], 4) if positions[number, b] > 0 else None for b in range(T_BINS)]
        row |= {"grad_norm": round(float(norm), 6), "lr": lr, "samples_per_s": round(rate, 2)}
        row["memory_gib"] = round(_memory_gib(), 3)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.bar.update(step - self.bar.n)
        shown = {f"loss {kind}": f"{row[f'loss_{kind}']:.3f}" for kind in KINDS}
        self.bar.set_postfix(shown | {"samples/s": f"{rate:.0f}"}, refresh=False)
        if self.board is not None:
            for key in ("loss", *(f"loss_{kind}" for kind in KINDS), "grad_norm", "lr", "samples_per_s"):
                self.board.add_scalar(key, row[key], step)

    def close(self) -> None:
        """End the bar's line."""
        if self.enabled:
            self.bar.close()
            if self.board is not None:
                self.board.close()


def _memory_gib() -> float:
    """Peak memory of this process: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
