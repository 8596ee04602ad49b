"""What the processes of a run tell each other: that one was asked to stop, that one is gone."""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator

from medim.errors import UserError

GONE_AFTER = 5.0  # seconds that the living have to report, once one process fails


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


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set in one process or more; all must ask."""
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device), "sum") > 0)


def multiplies_bf16() -> bool:
    """Whether this machine has instructions for it: emulated, bf16 is many times slower than float32."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported()


class Agreement:
    """Whether any process raised a flag, asked every step without waiting for the device: the answer is a step old."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.alone = accelerator.num_processes == 1
        self.group = None if self.alone else dist.new_group(backend="gloo")
        self.flag = torch.zeros(1)
        self.work: dist.Work | None = None

    def __call__(self, flag: bool) -> bool:
        """The same answer in all processes; True at most one step after the first flag."""
        if self.alone:
            return flag
        if self.work is not None:
            self.work.wait()
        said = bool(self.flag.item() > 0)
        self.flag = torch.tensor([float(flag)])
        self.work = dist.all_reduce(self.flag, group=self.group, async_op=True)
        return said

    def finish(self) -> None:
        """Wait for the exchange under way."""
        if self.work is not None:
            self.work.wait()
            self.work = None


class Roll:
    """Who takes part, so that one who is gone can be named. Kept in the store that the processes met at."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        self.store = dist.distributed_c10d._get_default_store() if self.world > 1 else None
        if self.store is not None:
            self.store.set(f"medim/host/{self.rank}", socket.gethostname())

    @contextmanager
    def watch(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the failure of an exchange between processes into one line.

        Raises:
            UserError: with the ranks that do not answer, and `where` the run stood.
        """
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            if self.store is None or not _about_others(error):
                raise
            raise UserError(f"{self._missing()}; {where()}") from error

    def _missing(self) -> str:
        assert self.store is not None
        try:
            self.store.set_timeout(timedelta(seconds=GONE_AFTER))
            self.store.set(f"medim/alive/{self.rank}", "1")
            time.sleep(GONE_AFTER)
            gone = [rank for rank in range(self.world) if not self.store.check([f"medim/alive/{rank}"])]
            named = [f"rank {rank} on {self.store.get(f'medim/host/{rank}').decode()}" for rank in gone]
        except (RuntimeError, dist.DistError):
            return "the process that the others met at (rank 0, or its launcher) is gone"
        if not named:
            return (
                "the processes lost their connection, though all of them still run: see the network, or train.timeout"
            )
        return f"{' and '.join(named)} of {self.world} ended or does not answer"


def _about_others(error: BaseException) -> bool:
    """Whether an exchange failed, and not this process's own work."""
    if isinstance(error, dist.DistError):
        return True
    said = str(error).lower()
    return any(word in said for word in ("gloo", "nccl", "connection", "timed out", "timeout", "peer", "store"))


def leave(accelerator: Accelerator) -> None:
    """End the exchange in order; without it a process that ends early upsets the others."""
    if accelerator.num_processes > 1:
        with suppress(RuntimeError, ValueError):
            accelerator.end_training()
