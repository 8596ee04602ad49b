"""Train with the causal mask that a backbone was pretrained with: what its removal is worth (MeDiM's ablation).

    python -m benchmarks.causal configs/train/smollm2.yaml run_dir=runs/smollm2-causal
    python -m benchmarks.causal configs/train/smollm2.yaml run_dir=runs/try train.steps=4 validation.every=0   # small

The arguments are those of train.py. Everything else is as there: AdaLN, loss, data, validation, which is causal too.
docs/backbone.md has the figures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from medim.canvas import Canvas
from medim.cli import run, train
from medim.model.medim import MeDiMModel


def causal_attention(model: MeDiMModel, canvas: Canvas, given: Bool[Tensor, "B L"] | None = None) -> dict[str, Any]:
    """As `MeDiMModel.attention` of sdpa, but no position sees a later one."""
    study = canvas.study
    mask = (study[:, :, None] == study[:, None, :]) & torch.ones_like(
        study[0, :, None] * study[0], dtype=torch.bool
    ).tril()
    return {"attention_mask": mask[:, None], "position_ids": canvas.position, "place": canvas.place}


def main(argv: Sequence[str]) -> int:
    """Train; returns the exit code."""
    MeDiMModel.attention = causal_attention  # type: ignore[method-assign, assignment]
    return run(train, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
