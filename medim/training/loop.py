"""The loop: it knows steps, processes and checkpoints; the task it is given knows models, batches and losses."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from medim.config import options
from medim.errors import UserError
from medim.objective import Batch, Loss
from medim.training.report import Meter
from medim.training.state import EMA, latest_checkpoint, load_checkpoint, prune, save_checkpoint, write_folder


@options
class TrainOptions:
    """How long, how fast and how safely.

    Attributes:
        batch_size: rows of the global batch, over all processes and accumulation steps.
        accumulate: parts that a process splits its share of the batch into.
        decay_from: share of the steps after which the learning rate falls linearly to zero.
        ema: decay of the averaged weights, which are what is shipped and evaluated.
        precision: bf16 is autocast, weights and optimizer stay float32; auto takes it where the hardware multiplies in
            bf16 (emulated, it is 60 times slower than fp32).
        workers: loader processes; 0 makes batches in the main process.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 100
    decay_from: float = 0.7
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.997
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0
    log_every: int = 1
    checkpoint_every: int = 500
    keep: int = 2
    tensorboard: bool = False


@runtime_checkable
class Task(Protocol):
    """What is trained."""

    @property
    def model(self) -> nn.Module:
        """The network."""
        ...

    def batches(self, step: int, rank: int, world: int, parts: int) -> list[Batch]:
        """This process's share of a step, in `parts`: a pure function of its arguments."""
        ...

    def count(self, batch: Batch) -> float:
        """What the loss sum of a batch is divided by, summed over the global batch."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sums over a batch."""
        ...

    def save(self, folder: Path, model: nn.Module) -> None:
        """Write a self-contained model folder."""
        ...


def learning_rate(step: int, o: TrainOptions) -> float:
    """Linear warm-up to `lr`, constant, then linear decay to zero from `decay_from` of the steps on."""
    start = o.decay_from * o.steps
    falling = 1.0 if step < start else (o.steps - step) / max(1.0, o.steps - start)
    return o.lr * min(1.0, (step + 1) / max(1, o.warmup)) * max(0.0, falling)


def make_optimizer(model: nn.Module, o: TrainOptions) -> torch.optim.AdamW:
    """AdamW; decay on matrices only."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, fused=True)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGUSR1 ask for a checkpoint and a clean end instead of killing."""
    asked: list[int] = []
    before = {s: signal.signal(s, lambda number, frame: asked.append(number)) for s in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Steps(torch.utils.data.Dataset[list[Batch]]):
    def __init__(self, task: Task, rank: int, world: int, o: TrainOptions, first: int) -> None:
        self.make, self.first, self.o = (lambda step: task.batches(step, rank, world, o.accumulate)), first, o

    def __len__(self) -> int:
        return self.o.steps - self.first

    def __getitem__(self, index: int) -> list[Batch]:
        return self.make(self.first + index)


class _Run:
    """What lives as long as a run: the prepared model, optimizer and EMA, where they are kept, and the first step."""

    def __init__(self, task: Task, o: TrainOptions, run_dir: Path, resolved: str) -> None:
        bf16 = o.precision == "bf16" or (o.precision == "auto" and multiplies_bf16())
        self.accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.lead = self.accelerator.is_main_process
        self.task, self.o, self.run_dir, self.resolved = task, o, run_dir, resolved
        if o.batch_size % (self.world * o.accumulate):
            raise UserError(
                f"train.batch_size={o.batch_size} is not shared evenly by {self.world} processes x {o.accumulate} parts"
            )
        found = latest_checkpoint(run_dir / "checkpoints")
        if found is not None and not same_config(run_dir, resolved):
            raise UserError(
                f"{run_dir}: holds a run with another config, see its config.yaml; give another run_dir, or that config"
            )
        if o.gradient_checkpointing:
            task.model.activation_checkpointing_enable()  # type: ignore[operator]
        if o.compile:
            task.model.compile_blocks()  # type: ignore[operator]
        self.model, self.optimizer = self.accelerator.prepare(task.model, make_optimizer(task.model, o))
        self.inner = self.accelerator.unwrap_model(self.model)
        self.ema, self.first = EMA(self.inner, o.ema), 0
        if found is not None:
            self.first = int(load_checkpoint(found, self.inner, self.optimizer.optimizer, self.ema)["step"])
        self.accelerator.wait_for_everyone()  # all have read before one writes
        if self.lead:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(resolved)
            if found is not None:
                print(f"resuming after step {self.first} from {found}", file=sys.stderr)

    def save(self, step: int) -> None:
        """A checkpoint after `step`; all processes call it."""
        self.accelerator.wait_for_everyone()
        if self.lead:
            folder = self.run_dir / "checkpoints" / f"step-{step:08d}"
            extra = {"config": self.resolved, "torch": torch.__version__, "batch_size": self.o.batch_size}
            optimizer, write = self.optimizer.optimizer, partial(self.task.save, model=self.inner)
            save_checkpoint(folder, step, write, self.inner, optimizer, self.ema, extra)
            prune(self.run_dir / "checkpoints", self.o.keep)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the averaged weights as the final model."""
        self.accelerator.wait_for_everyone()
        final = self.run_dir / "final"
        if self.lead:
            self.ema.copy_to(self.inner)
            write_folder(final, partial(self.task.save, model=self.inner))
        self.accelerator.wait_for_everyone()
        return final


def train(task: Task, o: TrainOptions, run_dir: Path, resolved: str) -> Path:
    """Train, or go on where the last complete checkpoint of `run_dir` ends; returns the final model folder.

    Args:
        resolved: the whole config as YAML; stored in every checkpoint and compared on resume.

    Raises:
        UserError: `run_dir` belongs to another config, the batch cannot be shared, or the loss is no longer a number.
    """
    if (run_dir / "final" / "config.json").is_file() and same_config(run_dir, resolved):
        print(f"{run_dir}: trained to the end already; to train again, remove it or change run_dir", file=sys.stderr)
        return run_dir / "final"
    run = _Run(task, o, run_dir, resolved)
    meter = Meter(run_dir, run.first, o.steps, o.batch_size, enabled=run.lead, tensorboard=o.tensorboard)
    steps = _Steps(task, run.rank, run.world, o, run.first)
    run.model.train()
    stop = False
    with closing(meter), stop_requests() as asked:
        for step, parts in enumerate(DataLoader(steps, batch_size=None, num_workers=o.workers), start=run.first + 1):
            rate = learning_rate(step - 1, o)
            for group in run.optimizer.param_groups:
                group["lr"] = rate
            losses, norm = _update(run.accelerator, task, run.model, run.optimizer, parts, o)
            run.ema.update(run.inner, step)
            if step % o.log_every == 0 or step == o.steps:
                loss = _reduced(run.accelerator, losses)
                _check_finite(loss, step, run_dir)
                meter.log(step, loss, norm, rate)
                stop = any_process(run.accelerator, asked())
            if step % o.checkpoint_every == 0 or stop:
                run.save(step)
            if stop:
                print(f"stopped on request; saved after step {step}, run the same command to go on", file=sys.stderr)
                raise SystemExit(0)
    return run.finish()


def _check_finite(loss: Loss, step: int, run_dir: Path) -> None:
    if not bool(torch.isfinite(loss.total)):
        raise UserError(
            f"step {step}: the loss is {float(loss.total)}; lower train.lr and start a new run_dir, init= the `model` "
            f"folder of a checkpoint in {run_dir / 'checkpoints'}"
        )


def _update(
    accelerator: Accelerator,
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    parts: list[Batch],
    o: TrainOptions,
) -> tuple[list[Loss], torch.Tensor]:
    """One optimizer step: sum over the global batch divided by the global count, whatever the number of parts."""
    counts = torch.tensor(sum(task.count(part) for part in parts), device=accelerator.device)
    total_count = accelerator.reduce(counts, "sum").clamp(min=1e-9)
    losses = []
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        with nullcontext() if last else accelerator.no_sync(model), accelerator.autocast():
            loss = task.loss(model, part.to(accelerator.device))
        accelerator.backward(loss.total / total_count * accelerator.num_processes)  # DDP takes the mean of gradients
        losses.append(Loss(loss.total.detach() / total_count, loss.nats, loss.positions))
    norm = accelerator.clip_grad_norm_(model.parameters(), o.clip)
    optimizer.step()
    optimizer.zero_grad()
    return losses, torch.as_tensor(norm)


def _reduced(accelerator: Accelerator, losses: list[Loss]) -> Loss:
    """The sum over parts and processes."""
    sums = [torch.stack([getattr(loss, name) for loss in losses]).sum(0) for name in ("total", "nats", "positions")]
    return Loss(*(accelerator.reduce(value, "sum") for value in sums))


def multiplies_bf16() -> bool:
    """Whether this machine has instructions for it: emulated, bf16 is many times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in one process or more; all must ask."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def same_config(run_dir: Path, resolved: str) -> bool:
    """Whether a run's stored config is this one."""
    path = run_dir / "config.yaml"
    return path.is_file() and path.read_text() == resolved
