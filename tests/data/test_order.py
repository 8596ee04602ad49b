"""The order of studies: epochs visit all, mixtures keep their shares, processes share without overlap."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from medim.data.order import BLOCK, Order, permuted, share, shares
from medim.errors import UserError


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 1000, 4096, 4097])
def test_a_permutation_of_any_size(size: int) -> None:
    seen = permuted(np.arange(size), size, (0, 1))
    assert sorted(seen) == list(range(size))
    parts = [permuted(np.arange(a, min(a + 7, size)), size, (0, 1)) for a in range(0, size, 7)]
    assert (np.concatenate(parts) == seen).all()  # each place for itself


def test_permutations_look_random() -> None:
    """Each place takes each value equally often over keys; neighbours do not stay neighbours."""
    size, keys = 5, 4000
    seen = np.array([permuted(np.arange(size), size, (3, key)) for key in range(keys)])
    counts = np.array([np.bincount(seen[:, place], minlength=size) for place in range(size)])
    assert ((counts - keys / size) ** 2 / (keys / size)).sum() < 40  # chi-square, 16 degrees: p = 8e-4
    orders = {tuple(one) for one in seen}
    assert len(orders) == 120  # of 5! all
    large = permuted(np.arange(10_000), 10_000, (0,))
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.04  # 4 standard errors
    assert abs(np.corrcoef(large, np.arange(10_000))[0, 1]) < 0.04


def test_a_place_outside() -> None:
    with pytest.raises(ValueError, match=r"places must lie in 0..4"):
        permuted(np.array([5]), 5, (0,))


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (10, 4), (5, 7)])
def test_every_epoch_visits_all(size: int, batch_size: int) -> None:
    order = Order(0, (size,))
    seen = np.concatenate([order.batch(step, batch_size)[1] for step in range(3 * size)]).reshape(-1, size)
    assert len(seen) == 3 * batch_size
    assert all(sorted(epoch) == list(range(size)) for epoch in seen)
    assert not (seen[0] == seen[1]).all()


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one = Order(1, (100,))
    assert (one.batch(40, 8)[1] == Order(1, (100,)).batch(40, 8)[1]).all()
    assert not (one.batch(40, 8)[1] == Order(2, (100,)).batch(40, 8)[1]).all()
    assert not (one.batch(40, 8)[1] == one.batch(41, 8)[1]).all()


MIXED = Order(5, (700, 90, 3), shares((700, 90, 3), weights=(0.6, 0.3, 0.1)))


@pytest.mark.parametrize("world", [1, 2, 4])
def test_processes_together_see_what_one_sees(world: int) -> None:
    for step in (0, 3, 1000):
        alone = MIXED.batch(step, 12)
        parts = [tuple(one[share(12, rank, world)] for one in MIXED.batch(step, 12)) for rank in range(world)]
        for whole, shared in zip(alone, zip(*parts, strict=True), strict=True):
            assert {len(part) for part in shared} == {12 // world}
            assert (np.concatenate(shared) == whole).all()


def test_any_step_can_be_the_first() -> None:
    """Nothing is carried from step to step, also across the end of a block."""
    steps = range(BLOCK // 24 - 2, BLOCK // 24 + 3)
    whole = MIXED.at(np.arange(steps[0] * 24, (steps[-1] + 1) * 24))
    for n, step in enumerate(steps):
        for ours, theirs in zip(MIXED.batch(step, 24), whole, strict=True):
            assert (ours == theirs[n * 24 : (n + 1) * 24]).all()


def test_a_mixture_keeps_its_shares_and_epochs() -> None:
    slots = 3 * BLOCK + 100
    sources, studies = MIXED.at(np.arange(slots))
    for blocks in (1, 2, 3):
        counts = np.bincount(sources[: blocks * BLOCK], minlength=3)
        assert (abs(counts - blocks * BLOCK * np.array([0.6, 0.3, 0.1])) < 1.001).all()
    for source, size in enumerate(MIXED.sizes):
        own = studies[sources == source]
        assert own.max() < size
        for epoch in np.split(own, range(size, len(own), size)):
            assert len(set(epoch)) == len(epoch)
    runs = np.diff(np.flatnonzero(sources == 2))
    assert 7 < runs.mean() < 13 and runs.max() < 150  # spread over the block, not at its end


def test_shares() -> None:
    assert shares((300, 100)) == (0.75, 0.25)
    assert shares((400, 100), temperature=2.0) == pytest.approx((2 / 3, 1 / 3))
    assert shares((400, 100), temperature=1e9) == pytest.approx((0.5, 0.5))
    assert shares((400, 100), weights=(1.0, 4.0)) == (0.2, 0.8)
    for wrong, words in (
        (lambda: shares((4, 0)), "holds no study"),
        (lambda: shares((4, 1), weights=(1.0,)), "1 weights for 2 sources"),
        (lambda: shares((4, 1), weights=(1.0, 0.0)), "above 0"),
        (lambda: shares((4, 1), temperature=0.0), "above 0"),
        (lambda: shares((10**6, 1)), "under 1/4096"),
    ):
        with pytest.raises(UserError, match=words):
            wrong()


def test_ten_million_studies_in_little_memory() -> None:
    order = Order(0, (10_000_000,))
    tracemalloc.start()
    seen = np.concatenate([order.batch(step, 64)[1] for step in (0, 77_777, 156_249)])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000  # bytes; a permutation would take 80 million
    assert len(set(seen.tolist())) == 192 and seen.max() > 5_000_000


def test_an_epoch_of_a_million_is_whole() -> None:
    hit = np.zeros(1_000_003, dtype=bool)
    hit[permuted(np.arange(1_000_003), 1_000_003, (1, 2))] = True
    assert hit.all()


def test_a_batch_that_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="a global batch of 10 cannot be shared evenly by 4 processes"):
        share(10, 0, 4)
