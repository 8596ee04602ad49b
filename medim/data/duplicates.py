"""Pictures that are the same but for their files: a perceptual fingerprint, and groups of fingerprints that are close.

Shape letters: N pictures, F bytes of a fingerprint, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, UInt8, UInt64
from numpy import ndarray
from scipy.fft import dctn
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SIDE = 16  # a fingerprint has a bit for each of SIDE x SIDE frequencies: 256 bits, 64 hex digits
RADIUS = 10  # of 256 bits
SAMPLE = 10_000  # fingerprints from which the balance of each bit is measured
BUFFER = 1_000_000  # pairs that are held before they are folded into groups


def fingerprint(image: PIL.Image.Image) -> str:
    """The picture's pHash: which of its lowest 16 x 16 frequencies lie above their median, row by row, as hex.

    The picture is made 64 x 64 and gray; the frequencies are those of the discrete cosine transform. It is the `phash`
    of the package ImageHash with hash_size 16. Measured on 2,000 phantom X-rays and 2,000 pathology tiles: JPEG of
    quality 75, half the size and back, and 5% more brightness move at most 8 of the 256 bits; two different X-rays
    differ in at least 16 bits (84 in the median), two tiles that share no pixel in at least 90. 64 bits are too few:
    different phantoms then have equal pHashes and equal dHashes.

    Source: Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), section 3.2.1.
    """
    side = 4 * SIDE
    pixels = np.asarray(image.convert("L").resize((side, side), PIL.Image.Resampling.LANCZOS), dtype=np.float64)
    low = dctn(pixels)[:SIDE, :SIDE]
    return np.packbits(low > np.median(low)).tobytes().hex()


def near_pairs(
    fingerprints: UInt8[ndarray, "N F"], radius: int = RADIUS, groups: Int[ndarray, " N"] | None = None
) -> Iterator[Int[ndarray, "P 2"]]:
    """Every pair (first < second) that differs in at most `radius` bits, each once, in portions.

    Bits are dealt to more bands than `radius`, so such a pair is equal in one band at least (the pigeonhole principle):
    only pairs with an equal band are compared. Bits that are set in half of the fingerprints tell most; they are dealt
    first, so that each band has its share. Memory is O(N). Time grows with the number of pairs that are equal in a
    band, and so steeply with `radius`.

    Args:
        groups: pairs of one group are left out; the caller may change the numbers between portions.

    Source: Norouzi et al., "Fast Exact Search in Hamming Space with Multi-Index Hashing" (1307.2982), section 2.
    """
    n, width = fingerprints.shape
    if n < 2:
        return
    padded = np.pad(fingerprints, ((0, 0), (0, -width % 8)))
    words = np.ascontiguousarray(padded).view(np.uint64)
    bits = np.unpackbits(fingerprints[:: -(-n // SAMPLE)], axis=1)
    order = np.argsort(np.abs(bits.mean(0) - 0.5), kind="stable")
    count = max(radius + 1, -(-8 * width // 64))  # a band's bits fit into one word
    bands = [order[k::count] for k in range(count)]
    masks = np.zeros((count, padded.shape[1]), dtype=np.uint8)
    for mask, band in zip(masks, bands, strict=True):
        np.bitwise_or.at(mask, band // 8, (128 >> band % 8).astype(np.uint8))
    for number, band in enumerate(bands):
        keys = np.zeros(n, dtype=np.uint64)
        for bit in band:
            set_there = fingerprints[:, bit // 8] >> np.uint8(7 - bit % 8) & np.uint8(1)
            keys = keys << np.uint64(1) | set_there.astype(np.uint64)
        sorting = np.argsort(keys, kind="stable")
        keys = keys[sorting]
        alive = own = np.arange(n)
        for step in range(1, n):  # neighbours, then those two apart, as far as runs of equal keys go
            if groups is not None and step & (step - 1) == 0:
                own = groups[sorting]
                alive = alive[_mixed(keys, own)[alive]]
            alive = alive[alive < n - step]
            alive = alive[keys[alive] == keys[alive + step]]
            if not alive.size:
                break
            left = alive if groups is None else alive[own[alive] != own[alive + step]]
            pairs = np.stack([sorting[left], sorting[left + step]], axis=1)
            differ = words[pairs[:, 0]] ^ words[pairs[:, 1]]
            near = np.bitwise_count(differ).sum(1, dtype=np.int64) <= radius
            pairs, differ = pairs[near], differ[near]
            for earlier in masks[:number].view(np.uint64):  # seen there already
                new = (differ & earlier).any(1)
                pairs, differ = pairs[new], differ[new]
            if len(pairs):
                yield np.sort(pairs, axis=1)


def _mixed(keys: UInt64[ndarray, " N"], groups: Int[ndarray, " N"]) -> Bool[ndarray, " N"]:
    """Which of sorted keys lie in runs of equal ones that are not of one group."""
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]])
    mixed = np.minimum.reduceat(groups, starts) != np.maximum.reduceat(groups, starts)
    return np.repeat(mixed, np.diff(np.r_[starts, len(keys)]))


def duplicates(fingerprints: UInt8[ndarray, "N F"], radius: int = RADIUS) -> Int[ndarray, " N"]:
    """The group of each fingerprint: two are in one if steps of at most `radius` bits lead from one to the other.

    Groups are numbered from 0 by their first members. Equal fingerprints are compared once, however many there are.
    """
    rows = np.ascontiguousarray(fingerprints).view(f"V{fingerprints.shape[1]}").ravel()
    distinct, inverse = np.unique(rows, return_inverse=True)
    unique = distinct.view(np.uint8).reshape(-1, fingerprints.shape[1])
    labels = np.arange(len(unique))
    held: list[ndarray] = []
    waiting = 0
    for pairs in near_pairs(unique, radius, labels):
        held.append(pairs)
        waiting += len(pairs)
        if waiting >= BUFFER:
            labels[:] = _fold(labels, np.concatenate(held))
            held, waiting = [], 0
    if held:
        labels[:] = _fold(labels, np.concatenate(held))
    _, first, group = np.unique(labels[inverse], return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group]


def _fold(labels: Int[ndarray, " N"], pairs: Int[ndarray, "P 2"]) -> Int[ndarray, " N"]:
    """Groups after the pairs have been joined."""
    edges = labels[pairs]
    size = len(labels)
    graph = coo_array((np.ones(len(edges), dtype=bool), (edges[:, 0], edges[:, 1])), shape=(size, size))
    return connected_components(graph, directed=False)[1].astype(np.int64)[labels]
