"""Writes the gradient of one step, run by test_gradients.py: arguments of train.py after the file to write."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

from safetensors.torch import save_file

from medim.config import dump, load
from medim.recipe import TrainConfig, make_task
from medim.training import loop
from medim.training.engine import make_accelerator


def main(out: str, path: str, *overrides: str) -> None:
    config = load(path, overrides, TrainConfig)
    accelerator = make_accelerator(False, 120.0)
    with accelerator.main_process_first():
        task = make_task(config)
    run = loop._Run(accelerator, task, config.train, config.log, Path(config.run_dir), dump(config))
    found = {}

    def keep() -> object:
        found.update({name: p.grad.clone() for name, p in run.engine.inner.named_parameters() if p.grad is not None})
        raise StopIteration

    run.engine.step = keep  # type: ignore[assignment]
    with contextlib.suppress(StopIteration):
        loop._update(run, task.batches(0, run.rank, run.world, config.train.accumulate))
    if accelerator.is_main_process:
        save_file(found, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
