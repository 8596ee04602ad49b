"""Which study comes when: a pure function of (seed, step), whatever the number of processes."""

from __future__ import annotations

import functools

import numpy as np


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng([seed, 7, epoch]).permutation(size)


def global_batch(seed: int, step: int, batch_size: int, size: int) -> np.ndarray:
    """Indices [batch_size] of the studies of a step: each epoch visits all `size` studies once, in its own order."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([_permutation(seed, int(p) // size, size)[int(p) % size] for p in positions])


def share(count: int, rank: int, world: int) -> slice:
    """The slice of a global batch that one of `world` processes takes.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    if count % world:
        raise ValueError(f"a global batch of {count} cannot be shared evenly by {world} processes")
    per = count // world
    return slice(rank * per, (rank + 1) * per)
