"""One of several processes that train a tokenizer together: vq_processes.py CONFIG OUT. Run by test_vq.py."""

from __future__ import annotations

import sys
import warnings

import torch

from medim.config import load
from medim.training.vq import VQRun, VQRunConfig


def main(path: str, out: str) -> None:
    torch.set_num_threads(1)
    run = VQRun(load(path, ["loss.disc_start=4"], VQRunConfig), "")
    assert len(run.slots) == 2, "the batch is not shared"
    tensors = {}
    for step in range(6):
        run.step(step, run.pictures.batch(step, run.slots))
        if step == 1:
            tensors |= {f"early.{name}": value.clone() for name, value in run.model.state_dict().items()}
    run.codebook.counts[:9] = 0.0
    vectors = torch.randn(20, 4, generator=torch.Generator().manual_seed(run.accelerator.process_index))
    assert run.codebook.restart_dead(vectors, seed=1) >= 9
    assert run.discriminator is not None
    tensors |= {f"model.{name}": value for name, value in run.model.state_dict().items()}
    tensors |= {f"discriminator.{name}": value.detach() for name, value in run.discriminator.named_parameters()}
    torch.save(tensors | run.codebook.tensors(), out)
    run.accelerator.end_training()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # accelerate's, about one CPU for two processes
    main(*sys.argv[1:])
