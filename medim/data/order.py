"""Which study comes when: a pure function of (seed, step, slot), in constant memory, whatever the number of processes.

The study at a place of an epoch is found by a permutation that is computed for that place alone: a Feistel network over
the next power of four, walked along its cycle until it lands below the size (Black and Rogaway, "Ciphers with
arbitrary finite domains", CT-RSA 2002). Nothing of the length of the dataset is ever held in memory.

A mixture of sources shares slots in blocks. Until the end of block b, the first s sources together have had
floor(b BLOCK W_s) slots, with W_s their summed shares; so every source gets its share to within one slot a block, and
how many of its studies came before any slot is known without counting. Within a block the slots are permuted. Each
source runs through epochs of its own: none of its studies comes twice before all have come once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from medim.errors import UserError

BLOCK = 4096  # slots in which a mixture keeps its shares
ROUNDS = 12  # fewer are not even for sizes of a handful
_ONE = 1 << 32  # shares are counted in this many parts


def _mix(values: np.ndarray, key: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014) of `values` and `key`, both uint64."""
    with np.errstate(over="ignore"):
        z = values + key * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def permuted(places: Int[np.ndarray, " n"], size: int, key: Sequence[int]) -> Int[np.ndarray, " n"]:
    """Where a permutation of 0..size-1, one for each key, puts `places`.

    Raises:
        ValueError: a place outside 0..size-1.
    """
    if size < 1 or (len(places) and not 0 <= int(places.min()) <= int(places.max()) < size):
        raise ValueError(f"places must lie in 0..{size - 1}")
    half = np.uint64(max(1, -(-(size - 1).bit_length() // 2)))
    low = np.uint64((1 << int(half)) - 1)
    keys = np.random.SeedSequence([int(k) for k in key]).generate_state(ROUNDS, np.uint64)
    result = places.astype(np.uint64)
    outside = np.arange(len(result))  # at first all of them, then those that have not landed below `size`
    while len(outside):
        left, right = result[outside] >> half, result[outside] & low
        for one in keys:
            left, right = right, left ^ (_mix(right, one) & low)
        result[outside] = (left << half) | right
        outside = outside[result[outside] >= np.uint64(size)]
    return result.astype(np.int64)


def shares(sizes: Sequence[int], temperature: float = 1.0, weights: Sequence[float] = ()) -> tuple[float, ...]:
    """The share of each source: its weight, or its size to the power of 1/temperature, divided by the sum.

    Temperature 1 draws every study equally often, a higher one small sources more often, infinity all sources alike.

    Raises:
        UserError: an empty source, a weight or temperature that is not positive, a number of weights that is not
            that of the sources, or a source whose share is under 1/4096.
    """
    if any(size < 1 for size in sizes):
        raise UserError("a source holds no study")
    if weights and len(weights) != len(sizes):
        raise UserError(f"{len(weights)} weights for {len(sizes)} sources: give one each")
    if temperature <= 0 or any(weight <= 0 for weight in weights):
        raise UserError("temperature and weights of a mixture must be above 0")
    raw = np.array(weights if weights else [size / max(sizes) for size in sizes], dtype=np.float64)
    raw = raw if weights else raw ** (1 / temperature)
    found = raw / raw.sum()
    if (found * BLOCK < 1).any():
        raise UserError(f"a source has a share of {found.min():.1e}; under 1/{BLOCK} it would never be drawn evenly")
    return tuple(float(one) for one in found)


@dataclass(frozen=True)
class Order:
    """The order of the studies of one or more sources.

    Attributes:
        sizes: studies of each source.
        shares: of the slots that each source gets; see `shares`.
    """

    seed: int
    sizes: tuple[int, ...]
    shares: tuple[float, ...] = (1.0,)

    def batch(self, step: int, batch_size: int) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The source and the study within it of each of the `batch_size` slots of a step."""
        return self.at(np.arange(step * batch_size, (step + 1) * batch_size))

    def at(self, slots: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The source and the study within it of any slots."""
        sources, numbers = self._numbered(slots)
        studies = np.empty_like(numbers)
        for source, size in enumerate(self.sizes):
            epochs, places = np.divmod(numbers, size)
            for epoch in np.unique(epochs[sources == source]):
                here = (sources == source) & (epochs == epoch)
                studies[here] = permuted(places[here], size, (self.seed, 7, source, int(epoch)))
        return sources, studies

    def _numbered(self, slots: Int[np.ndarray, " n"]) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
        """The source of each slot, and how many of that source came before."""
        if len(self.sizes) == 1:
            return np.zeros_like(slots), slots
        sources, numbers = np.empty_like(slots), np.empty_like(slots)
        for block in np.unique(slots // BLOCK):
            here = slots // BLOCK == block
            for result, of_block in zip((sources, numbers), _block(self.seed, self.shares, int(block)), strict=True):
                result[here] = of_block[slots[here] % BLOCK]
        return sources, numbers


@functools.lru_cache(maxsize=4)
def _block(seed: int, parts: tuple[float, ...], block: int) -> tuple[np.ndarray, np.ndarray]:
    """The source of each slot of a block, and how many of that source came before."""
    edges = [0, *(round(one * _ONE) for one in np.cumsum(parts)[:-1]), _ONE]
    before, until = (np.diff([(b * BLOCK * edge) // _ONE for edge in edges]) for b in (block, block + 1))
    turn = permuted(np.arange(BLOCK), BLOCK, (seed, 8, block))
    sources = np.searchsorted(np.cumsum(until - before), turn, side="right")
    numbers = np.empty_like(sources)
    for source, count in enumerate(before):
        numbers[sources == source] = count + np.arange((sources == source).sum())
    return sources, numbers


def share(count: int, rank: int, world: int) -> slice:
    """The slice of a global batch that one of `world` processes takes.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    if count % world:
        raise ValueError(f"a global batch of {count} cannot be shared evenly by {world} processes")
    per = count // world
    return slice(rank * per, (rank + 1) * per)
