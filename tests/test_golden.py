"""A golden curve: the losses of a few steps of a tiny model. A refactoring must not change them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from medim.canvas import Canvas
from medim.objective import ObjectiveOptions, count, loss, make_batch
from medim.training.loop import TrainOptions, learning_rate
from medim.training.optimizer import make_optimizer

GOLDEN = Path(__file__).parent / "golden" / "losses.json"


@pytest.mark.parametrize("weighting", ["flat", "mdlm"])
def test_losses_are_those_of_the_golden_curve(
    weighting: str, tiny_network: Any, make_rows: Callable[[Sequence[int]], list[Any]]
) -> None:
    """The tolerance is that of another machine's arithmetic."""
    o, t = ObjectiveOptions(weighting=weighting), TrainOptions(steps=12, lr=3e-3, warmup=2)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in tiny_network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    optimizer = make_optimizer(tiny_network, t)
    rows = make_rows([4, 7, 5, 6, 8, 4, 5, 7])
    curve = []
    for step in range(t.steps):
        batch = make_batch(Canvas.collate(rows, 0), range(8), 8, step, 0, o, tiny_network.vocabulary.mask)
        value = loss(tiny_network, batch, o).total / count(batch, o)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, t)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(round(value.item(), 5))
    assert sum(curve[-3:]) < sum(curve[:3]), "nothing is learnt"
    golden = json.loads(GOLDEN.read_text())
    assert curve == pytest.approx(golden[weighting], rel=2e-3)
