"""However a batch is shared out, over processes and over time, its gradient is the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
SHARES = ((4, 1), (2, 2), (1, 4), (1, 1))  # processes, parts


@pytest.mark.parametrize("pack", [0, 512])
def test_gradients_of_reports_of_unequal_lengths(pack: int, make_runs: Callable[..., Any], tmp_path: Path) -> None:
    small = "{hidden_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}"
    runs = make_runs(init="", slot__multiple=4, slot__longest=44, model__backbone=small, train__batch_size=8)
    gradients = {}
    for processes, parts in SHARES:
        out = tmp_path / f"{processes}x{parts}.safetensors"
        name = f"{pack}-{processes}x{parts}"
        command = runs.command(
            name, "cpu" if processes > 1 else "", processes, train__accumulate=parts, data__pack=pack
        )
        at = command.index("train.py")
        command[at : at + 1] = ["tests/distributed/gradients.py", str(out)]
        process = runs.start(*command)
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
        gradients[processes, parts] = load_file(out)
    whole = gradients.pop((1, 1))
    assert max(float(value.abs().max()) for value in whole.values()) > 1e-2
    for shares, found in gradients.items():
        assert found.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=f"{shares} {name}")
