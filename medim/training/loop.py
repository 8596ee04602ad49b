"""The loop: it knows steps, processes and checkpoints; the task it is given knows models, batches and losses."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from omegaconf import OmegaConf
from pydantic import Field
from torch import nn
from torch.utils.data import DataLoader

from medim.config import options
from medim.errors import UserError
from medim.model.flops import Costs, Work, peak_of, total
from medim.objective import Batch, Loss
from medim.training.checkpoint import Checkpoint, export, save
from medim.training.engine import EMA, make_engine
from medim.training.folders import latest_checkpoint, prune, same_config
from medim.training.optimizer import WHOLE, OptimizerOptions, make_optimizer
from medim.training.processes import Agreement, Roll, stop_requests
from medim.training.report import Log, LogOptions, Meter, Throughput, append, drop_after, read_rows
from medim.training.validation import Validation
from medim.training.weights import Source


@options
class TrainOptions(OptimizerOptions):
    """How long, how fast and how safely.

    Attributes:
        batch_size: rows of the global batch, over all processes and accumulation steps.
        accumulate: parts that a process splits its share of the batch into.
        decay_from: share of the steps after which the learning rate falls linearly to zero.
        ema: decay of the averaged weights, which are what is shipped and evaluated.
        precision: bf16 is autocast, weights and optimizer stay float32; auto takes it where the hardware multiplies in
            bf16 (emulated, it is 60 times slower than fp32).
        gradient_checkpointing: 1: blocks forget their activations and compute them again; k: every k-th does; 0: none.
        workers: loader processes; 0 makes batches in the main process.
        keep: newest checkpoints that stay; besides, those of every `keep_every`-th step (0: none).
        timeout: seconds that a process waits for the others before it says that they are gone.
    """

    steps: int = 1000
    batch_size: int = 32
    accumulate: int = 1
    warmup: int = 100
    decay_from: float = 0.7
    clip: float = 1.0
    ema: float = 0.997
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    compile: bool = False
    gradient_checkpointing: Annotated[int, Field(ge=0)] = 0
    workers: int = 0
    checkpoint_every: Annotated[int, Field(ge=1)] = 500
    keep: Annotated[int, Field(ge=1)] = 2
    keep_every: Annotated[int, Field(ge=0)] = 0
    timeout: float = 1800.0


@runtime_checkable
class Task(Protocol):
    """What is trained."""

    @property
    def model(self) -> nn.Module:
        """The network, a skeleton."""
        ...

    @property
    def stored(self) -> Source | None:
        """Where its weights are; None: they are drawn from `seed`."""
        ...

    @property
    def seed(self) -> int:
        """Of the weights."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a run must find unchanged to go on, beside its config."""
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

    @property
    def validation(self) -> Validation | None:
        """The fixed set, if there is one."""
        ...

    def studies(self, step: int) -> list[str]:
        """Ids of the studies of a step."""
        ...

    def work(self, batch: Batch) -> Work:
        """What the mathematics must do for a batch."""
        ...

    def draw(self, model: nn.Module) -> PIL.Image.Image | None:
        """A picture of what the network can do."""
        ...

    def check_sharing(self, way: str, divides_weights: bool) -> None:
        """Raise UserError if the network cannot be shared so."""
        ...

    def save(self, folder: Path) -> None:
        """Write a model folder without its weights."""
        ...


def learning_rate(step: int, o: TrainOptions) -> float:
    """Linear warm-up to `lr`, constant, then linear decay to zero from `decay_from` of the steps on."""
    start = o.decay_from * o.steps
    falling = 1.0 if step < start else (o.steps - step) / max(1.0, o.steps - start)
    return o.lr * min(1.0, (step + 1) / max(1, o.warmup)) * max(0.0, falling)


class _Steps(torch.utils.data.Dataset[tuple[list[Batch], float, float]]):
    """A process's parts of each step that is left, with what they cost."""

    def __init__(self, task: Task, rank: int, world: int, o: TrainOptions, first: int) -> None:
        self.task, self.rank, self.world, self.first, self.o = task, rank, world, first, o
        self.costs: Costs | None = None

    def __len__(self) -> int:
        return self.o.steps - self.first

    def __getitem__(self, index: int) -> tuple[list[Batch], float, float]:
        """The parts, their positions without padding, and the FLOPs that they need."""
        parts = self.task.batches(self.first + index, self.rank, self.world, self.o.accumulate)
        work = [self.task.work(part) for part in parts]
        flops = sum(total(self.costs.needed(one)) for one in work) if self.costs is not None else 0.0
        return parts, float(sum(one.valid for one in work)), flops


class _Run:
    """What lives as long as a run: the model as it is shared, its average, where they are kept, and the first step."""

    def __init__(
        self, accelerator: Accelerator, task: Task, o: TrainOptions, log: LogOptions, run_dir: Path, resolved: str
    ) -> None:
        self.accelerator, self.task, self.o, self.run_dir, self.resolved = accelerator, task, o, run_dir, resolved
        self.log_options = log
        self.world, self.rank = accelerator.num_processes, accelerator.process_index
        self.lead = accelerator.is_main_process
        self.folder, self.first = run_dir / "checkpoints", 0
        if o.batch_size % (self.world * o.accumulate):
            raise UserError(
                f"train.batch_size={o.batch_size} is not shared evenly by {self.world} processes x {o.accumulate} parts"
            )
        found = self._latest()
        if found is not None:
            self._check_unchanged(found)
        if o.gradient_checkpointing:
            task.model.recompute_blocks(o.gradient_checkpointing)  # type: ignore[operator]
        self.costs = Costs.of(task.model)  # type: ignore[arg-type]
        self.engine = make_engine(accelerator, task.model, o.clip)
        task.check_sharing(self.engine.way, self.engine.divides_weights)
        if o.optimizer in WHOLE and not self.engine.replicated:
            raise UserError(f"train.optimizer={o.optimizer}: not with {self.engine.way}, only on one GPU or DDP")
        self.engine.build(task.stored, task.seed, lambda model: make_optimizer(model, o), o.compile)
        self.ema = EMA(self.engine, o.ema)
        if found is not None:
            self.first = found.restore(self.engine, self.ema)
        accelerator.wait_for_everyone()  # all have read before one writes
        if self.lead:
            run_dir.mkdir(parents=True, exist_ok=True)
            (run_dir / "config.yaml").write_text(resolved)
            share = o.batch_size // (self.world * o.accumulate)
            print(f"{self.engine}: {o.batch_size} rows a step, {share} at a time each", file=sys.stderr)
            if found is not None:
                print(f"resuming after step {self.first} from {found.folder}", file=sys.stderr)

    def _latest(self) -> Checkpoint | None:
        """The newest complete checkpoint, as the first process sees it."""
        chosen = [latest_checkpoint(self.folder, Checkpoint) if self.lead else None]
        path = broadcast_object_list(chosen)[0]
        return None if path is None else Checkpoint(path)

    def _check_unchanged(self, found: Checkpoint) -> None:
        before = {"config": OmegaConf.create(found.state["config"]), "data": found.state["identity"]}
        now = {"config": OmegaConf.create(self.resolved), "data": self.task.identity}
        changed = differences(_flat(before), _flat(now))
        refused = [line for key, line in changed.items() if not _harmless(key, found, self.o)]
        if refused:
            said = "\n  ".join(refused)
            raise UserError(
                f"{self.run_dir}: what is learnt would not be what either config says, since step "
                f"{found.state['step']} was reached with\n  {said}\nset it back, or give another run_dir"
                f" (and init={found.folder} to start from there)"
            )
        if changed and self.lead:
            print("changed since the checkpoint: " + "; ".join(changed.values()), file=sys.stderr)

    def save(self, step: int) -> None:
        """A checkpoint after `step`; all processes call it."""
        folder = self.folder / f"step-{step:08d}"
        extra = {
            "config": OmegaConf.to_container(OmegaConf.create(self.resolved)),
            "identity": dict(self.task.identity),
            "torch": torch.__version__,
        }
        save(folder, step, self.engine, self.ema, self.task.save, extra)
        if self.lead:
            prune(self.folder, self.o.keep, self.o.keep_every)
        self.accelerator.wait_for_everyone()

    def finish(self) -> Path:
        """Write the averaged weights as the final model, from the last checkpoint."""
        final, last = self.run_dir / "final", self.folder / f"step-{self.o.steps:08d}"
        if self.lead:
            export(last, final)
        self.accelerator.wait_for_everyone()
        return final

    def meter(self) -> Meter:
        """The run's log, from its first step on."""
        peak = peak_of(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
        log = Log(self.run_dir, self.first, self.o.steps, self.log_options, enabled=self.lead)
        if self.lead:
            for name in ("validation.jsonl", "spikes.jsonl"):
                drop_after(self.run_dir / name, self.first)
            rows = read_rows(self.run_dir / "validation.jsonl")
            if rows and min(rows, key=lambda row: row["loss"])["step"] == self.first:
                export(self.folder / f"step-{self.first:08d}", self.run_dir / "best")  # a kill may have come before
        throughput = Throughput(self.accelerator, peak)
        return Meter(log, throughput, self.log_options, self.o.batch_size, self.task.studies, self.last)

    def look(self, step: int, log: Log) -> bool:
        """Validate and draw when their step has come, with the averaged weights; all processes call it.

        Returns whether the model is the best so far.
        """
        validation, pictures = self.task.validation, self.log_options.pictures
        validating = validation is not None and (step % validation.o.every == 0 or step == self.o.steps)
        drawing = bool(pictures) and step % pictures == 0
        if not validating and not drawing:
            return False
        better = False
        self.engine.model.eval()
        with self.ema.in_place(), self.accelerator.autocast():
            if validation is not None and validating:
                better = self._validate(validation, step, log)
            if drawing and (self.lead or self.engine.divides_weights):  # where weights are divided, all draw the same
                sheet = self.task.draw(self.engine.inner)
                if sheet is not None:
                    log.picture(step, sheet)
        self.engine.model.train()
        self.accelerator.wait_for_everyone()
        return better

    def keep_best(self, step: int) -> None:
        """Write the model of this step's checkpoint as the best."""
        if self.lead:
            export(self.folder / f"step-{step:08d}", self.run_dir / "best")
        self.accelerator.wait_for_everyone()

    def _validate(self, validation: Validation, step: int, log: Log) -> bool:
        """Write a line; returns whether it is the best so far."""
        accelerator, path = self.accelerator, self.run_dir / "validation.jsonl"
        row = validation(
            self.engine.model, self.rank, self.world, accelerator.device, lambda sums: accelerator.reduce(sums, "sum")
        )
        best = min((one["loss"] for one in read_rows(path)), default=float("inf"))
        accelerator.wait_for_everyone()  # all have read before one writes
        if self.lead:
            append(path, {"step": step} | row)
            log.track({"step": step} | row, "validation/")
        return row["loss"] < best

    def last(self) -> str:
        """The last complete checkpoint, as messages name it."""
        kept = sorted(self.folder.glob("step-*"))
        return f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was written yet"


HARMLESS = (
    *("run_dir", "data.path", "train.accumulate", "train.compile", "train.gradient_checkpointing", "train.workers"),
    *("train.checkpoint_every", "train.keep", "train.keep_every", "train.timeout"),
    *("log", "validation", "estimate", "model.backbone.attn_implementation"),
)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, f"{name}.") if hasattr(value, "items") else {name: value}
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, str]:
    """Lines such as ``config.train.lr: 0.001, now 0.002``, by key."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return {key: f"{key.removeprefix('config.')}: {before.get(key)}, now {now.get(key)}" for key in keys}


def _harmless(key: str, found: Checkpoint, o: TrainOptions) -> bool:
    """Whether a run may go on with another value and still be the run that one config describes."""
    name = key.removeprefix("config.")
    if name == "train.steps":  # the learning rate until here was the same if it was not yet falling
        steps = min(o.steps, int(found.state["config"]["train"]["steps"]))
        return int(found.state["step"]) <= o.decay_from * steps
    return any(name == free or name.startswith(f"{free}.") for free in HARMLESS)


def train(
    accelerator: Accelerator, task: Task, o: TrainOptions, log: LogOptions, run_dir: Path, resolved: str
) -> Path | None:
    """Train, or go on where the last complete checkpoint of `run_dir` ends.

    Returns the final model folder; None if the run was asked to stop before, and saved.

    Args:
        accelerator: of `medim.training.engine.make_accelerator`.
        resolved: the whole config as YAML; stored in every checkpoint and compared on resume.

    Raises:
        UserError: `run_dir` belongs to another config, the batch cannot be shared, a process is gone, the disk is full,
            or the loss is no longer a number.
    """
    if (run_dir / "final" / "config.json").is_file() and same_config(run_dir, resolved):
        if accelerator.is_main_process:
            print(
                f"{run_dir}: trained to the end already; to train again, remove it or change run_dir", file=sys.stderr
            )
        return run_dir / "final"
    roll = Roll(accelerator)
    run = _Run(accelerator, task, o, log, run_dir, resolved)
    with stop_requests() as asked, roll.watch(run.last):  # in this order: the launcher sends SIGTERM when one dies
        return run.finish() if _loop(run, asked) else None


def _loop(run: _Run, asked: Callable[[], bool]) -> bool:
    """Make the steps that are left; False if asked to stop before the last."""
    o, engine, log = run.o, run.engine, run.log_options
    steps = _Steps(run.task, run.rank, run.world, o, run.first)
    steps.costs = run.costs
    loader = DataLoader(steps, batch_size=None, num_workers=o.workers, prefetch_factor=2 if o.workers else None)
    agree, meter = Agreement(run.accelerator), run.meter()
    engine.model.train()
    with closing(meter.log):
        arrived = time.perf_counter()
        for step, (parts, tokens, flops) in enumerate(loader, start=run.first + 1):
            meter.throughput.add(tokens, flops, time.perf_counter() - arrived)
            rate = learning_rate(step - 1, o)
            engine.set_rate(rate)
            loss, norm = _update(run, parts)
            meter.add(loss)
            run.ema.update(step)
            stop = agree(asked())
            saving = step % o.checkpoint_every == 0 or stop or step == o.steps
            if step % log.every == 0 or saving:
                meter.write(step, norm, rate)  # before a checkpoint, so that none has a loss that is no number
            better = run.look(step, meter.log)
            if saving or better:
                run.save(step)
            if better:
                run.keep_best(step)
            if stop and step < o.steps:
                agree.finish()
                if run.lead:
                    print(
                        f"stopped on request; saved after step {step}, run the same command to go on", file=sys.stderr
                    )
                return False
            arrived = time.perf_counter()
        agree.finish()
    return True


def _update(run: _Run, parts: list[Batch]) -> tuple[Loss, torch.Tensor]:
    """One optimizer step: sum over the global batch divided by the global count, whatever the number of parts.

    Returns this process's share of the loss and the norm of the whole gradient.
    """
    accelerator, task, engine = run.accelerator, run.task, run.engine
    counts = torch.tensor(sum(task.count(part) for part in parts), device=accelerator.device)
    total_count = accelerator.reduce(counts, "sum").clamp(min=1e-9)
    losses = []
    for number, part in enumerate(parts):
        last = number + 1 == len(parts)
        with engine.computing(last):
            with accelerator.autocast():
                loss = task.loss(engine.model, part.to(accelerator.device))
            beside = loss.beside / len(parts)
            whole = loss.total / total_count + beside
            engine.backward(whole * run.world, last)  # gradients become the mean over processes
        means = loss.parts / len(parts)
        losses.append(Loss(whole.detach(), loss.nats, loss.positions, beside.detach(), means))
    names = ("total", "nats", "positions", "beside", "parts")
    together = (torch.stack([getattr(one, name) for one in losses]).sum(0) for name in names)
    return Loss(*together), engine.step()
