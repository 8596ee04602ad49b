"""Figures of `medim estimate` against what real tensors hold, and what torch counts."""

from __future__ import annotations

import json
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from medim.canvas import Canvas, Segment, layout
from medim.cli import main
from medim.config import load
from medim.errors import UserError
from medim.estimate import FREE, Budget, estimate, will_it_fit
from medim.model.lora import add_lora
from medim.model.medim import MeDiMModel
from medim.objective import Batch, loss, make_batch
from medim.recipe import TrainConfig
from medim.training.loop import make_optimizer
from medim.training.memory import GIB, Sharing
from tests.fixtures.flops import counted

ROOT = Path(__file__).parent.parent
DEMO = str(ROOT / "configs/train/demo_scratch.yaml")


def config_of(*overrides: str, path: str = DEMO) -> TrainConfig:
    return load(
        path,
        [f"text_tokenizer={ROOT}/tokenizers/demo-bpe", f"image_tokenizer={ROOT}/tokenizers/demo-vq", *overrides],
        TrainConfig,
    )


def real(config: TrainConfig, sharing: Sharing | None = None) -> tuple[Budget, MeDiMModel]:
    """The estimate, and the model itself with weights."""
    budget = estimate(config, sharing or Sharing())
    model = MeDiMModel(budget.model.config).train()
    if config.lora.rank:
        add_lora(model, config.lora)
    if config.train.gradient_checkpointing:
        model.recompute_blocks(config.train.gradient_checkpointing)
    return budget, model


def batch_of(budget: Budget, model: MeDiMModel, seed: int = 0) -> Batch:
    """Random studies of the sizes that the estimate assumes, as many as a GPU has at a time."""
    rng, sizes, vocabulary = np.random.default_rng(seed), budget.sizes, model.vocabulary
    rows = []
    for _ in range(budget.studies):
        codes = rng.integers(*vocabulary.image, sizes.image_codes).tolist()
        report = rng.integers(*vocabulary.text, sizes.report).tolist()
        rows.append(layout([Segment("image", "xray", codes), Segment("report", "text", report)], vocabulary))
    canvas = Canvas.pack(rows, 0, sizes.pack) if sizes.pack else Canvas.collate(rows, 0)
    places = range(len(rows))
    return make_batch(canvas, places, len(rows), seed, seed, budget.config.objective, vocabulary.mask)


def saved_bytes(model: MeDiMModel, budget: Budget, bf16: bool) -> int:
    """Of all that autograd keeps for the backward pass, each storage once, weights not."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, Tensor] = {}

    def pack(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            found[value.untyped_storage().data_ptr()] = value  # kept, so that no other takes its place
        return value

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        loss(model, batch_of(budget, model), budget.config.objective)
    return sum(value.untyped_storage().nbytes() for value in found.values())


MODES = {
    "plain": [],
    "every block again": ["train.gradient_checkpointing=1"],
    "every second block again": ["train.gradient_checkpointing=2"],
    "padding": ["objective.condition_attention=full", "estimate.report=40", "slot.multiple=4"],
    "packed": ["data.pack=512"],
    "one length": ["objective.condition_attention=full"],
    "adapters": ["init=demo", "lora.rank=4"],
    "bf16": ["train.precision=bf16"],
    "bf16, every second block again": ["train.precision=bf16", "train.gradient_checkpointing=2"],
    "bf16, frozen": ["train.precision=bf16", "init=demo", "lora.rank=4", "lora.frozen=bf16"],
}


@pytest.mark.parametrize("mode", MODES)
def test_what_autograd_keeps_is_counted(mode: str) -> None:
    bf16 = mode.startswith("bf16")
    config = config_of("train.precision=fp32", "train.batch_size=3", *MODES[mode])
    budget, model = real(config)
    found = budget.bytes(3)
    again = config.train.gradient_checkpointing
    # autocast's own copies for blocks that run again are held by its cache, not by autograd
    cached = budget.saved.copies * (model.config.backbone["num_hidden_layers"] // again) if bf16 and again else 0
    kept = found["activations"] + budget.saved.fixed - cached
    assert kept == pytest.approx(saved_bytes(model, budget, bf16), rel=0.02)
