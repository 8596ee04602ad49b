"""The order of studies: every epoch a permutation of all, and processes that share a batch without overlap."""

from __future__ import annotations

import numpy as np
import pytest

from medim.data.order import global_batch, share


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (5, 7)])
def test_every_epoch_is_a_permutation(size: int, batch_size: int) -> None:
    steps = 3 * size  # whole epochs
    seen = np.concatenate([global_batch(0, step, batch_size, size) for step in range(steps)]).reshape(-1, size)
    assert len(seen) == 3 * batch_size
    for epoch in seen:
        assert sorted(epoch) == list(range(size))
    assert not (seen[0] == seen[1]).all()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    assert (global_batch(1, 40, 8, 100) == global_batch(1, 40, 8, 100)).all()
    assert not (global_batch(1, 40, 8, 100) == global_batch(2, 40, 8, 100)).all()
    assert not (global_batch(1, 40, 8, 100) == global_batch(1, 41, 8, 100)).all()


@pytest.mark.parametrize("world", [1, 2, 3, 6])
def test_shares_make_up_the_batch(world: int) -> None:
    batch = global_batch(0, 3, 12, 50)
    parts = [batch[share(12, rank, world)] for rank in range(world)]
    assert {len(part) for part in parts} == {12 // world}
    assert (np.concatenate(parts) == batch).all()


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="a global batch of 10 cannot be shared evenly by 4 processes"):
        share(10, 0, 4)
