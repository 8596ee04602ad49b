"""Fingerprints survive copying and tell studies apart; groups are those that comparing all pairs finds."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import pytest
from scipy.sparse.csgraph import connected_components

from medim.data import phantom
from medim.data.duplicates import RADIUS, duplicates, fingerprint, near_pairs


def bits(hexadecimal: str) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(hexadecimal), dtype=np.uint8))


def distances(prints: np.ndarray) -> np.ndarray:
    """Hamming distances of all pairs, [N, N]."""
    ones = np.unpackbits(prints, axis=1).astype(np.int64)
    return ones @ (1 - ones).T + (1 - ones) @ ones.T


def jpeg(image: PIL.Image.Image) -> PIL.Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=75)
    with PIL.Image.open(file) as opened:
        opened.load()
        return opened


def halved(image: PIL.Image.Image) -> PIL.Image.Image:
    small = image.resize((image.width // 2, image.height // 2), PIL.Image.Resampling.BICUBIC)
    return small.resize(image.size, PIL.Image.Resampling.BICUBIC)


def brighter(image: PIL.Image.Image) -> PIL.Image.Image:
    return image.point(lambda value: min(255, round(1.05 * value)))


def pictures(domain: str, count: int) -> list[PIL.Image.Image]:
    from medim.data import pathology

    study = phantom.study if domain == "xray" else pathology.study
    found = [study(0, index, "train").images[0].pixels for index in range(count)]
    return [image for image in found if isinstance(image, PIL.Image.Image)]


@pytest.mark.parametrize("domain", ["xray", "pathology"])
@pytest.mark.parametrize("copy", [jpeg, halved, brighter])
def test_copies_stay_within_the_radius(domain, copy):
    for image in pictures(domain, 12):
        assert (bits(fingerprint(image)) != bits(fingerprint(copy(image)))).sum() <= RADIUS


def test_different_studies_stay_apart():
    prints = np.array([np.packbits(bits(fingerprint(image))) for image in pictures("xray", 150)])
    apart = distances(prints)[np.triu_indices(150, 1)]
    assert apart.min() > RADIUS and np.median(apart) > 60


def test_a_fingerprint_is_64_hexadecimal_digits_and_ignores_colour_depth():
    gray = pictures("xray", 1)[0]
    assert len(fingerprint(gray)) == 64 and int(fingerprint(gray), 16)
    assert fingerprint(gray) == fingerprint(gray.convert("RGB"))


def test_a_fingerprint_is_the_phash_of_imagehash():
    imagehash = pytest.importorskip("imagehash", reason="pip install ImageHash")
    for image in [*pictures("xray", 5), *pictures("pathology", 5)]:
        assert fingerprint(image) == str(imagehash.phash(image, hash_size=16))


def planted(n: int, bytes_: int, seed: int) -> np.ndarray:
    """Unlike rows, copies with a few bits flipped, and equal ones; low-entropy bits as in real pictures."""
    rng = np.random.default_rng(seed)
    p = rng.beta(0.5, 0.5, 8 * bytes_)
    base = rng.random((n // 2, 8 * bytes_)) < p
    copies = base[rng.integers(0, len(base), n - len(base))]
    for row in copies:
        row[rng.choice(row.size, rng.integers(0, 16), replace=False)] ^= True
    return np.packbits(np.concatenate([base, copies]), axis=1)


@pytest.mark.parametrize("radius", [0, 1, 5, 10, 17])
@pytest.mark.parametrize("width", [32, 5])
def test_pairs_and_groups_are_those_of_brute_force(radius, width, monkeypatch):
    prints = planted(400, width, seed=radius)
    near = distances(prints) <= radius
    expected = {(i, j) for i, j in np.argwhere(near) if i < j}
    found = [tuple(pair) for part in near_pairs(prints, radius) for pair in part.tolist()]
    assert len(found) == len(set(found)) and set(found) == expected and expected
    _, wanted = connected_components(near)
    for held in (1_000_000, 7):
        monkeypatch.setattr("medim.data.duplicates.BUFFER", held)
        groups = duplicates(prints, radius)
        assert len(set(zip(groups.tolist(), wanted.tolist(), strict=True))) == len(set(wanted)) == groups.max() + 1
        _, first = np.unique(groups, return_index=True)
        assert (np.diff(first) > 0).all()  # numbered by their first members


def test_groups_are_joined_over_portions(monkeypatch):
    chain = np.zeros((40, 32), dtype=np.uint8)
    for k in range(40):  # each a bit from the next, the ends 39 bits apart
        chain[k] = np.packbits(np.arange(256) < k)
    monkeypatch.setattr("medim.data.duplicates.BUFFER", 3)
    assert duplicates(chain[np.random.default_rng(0).permutation(40)], 1).tolist() == [0] * 40
    assert duplicates(chain, 0).tolist() == list(range(40))


def test_few_and_equal():
    assert duplicates(np.zeros((0, 32), dtype=np.uint8)).tolist() == []
    assert duplicates(np.zeros((1, 32), dtype=np.uint8)).tolist() == [0]
    assert duplicates(np.zeros((50_000, 32), dtype=np.uint8)).tolist() == [0] * 50_000  # not 1,250,000,000 pairs


def test_many_nearly_blank_pictures_are_one_group_without_all_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    bits = np.zeros((3000, 256), dtype=bool)
    for row in bits:
        row[rng.choice(256, 4, replace=False)] = True
    compared = []
    monkeypatch.setattr("medim.data.duplicates.BUFFER", 10_000)
    monkeypatch.setattr(
        "medim.data.duplicates.near_pairs",
        lambda *args: (compared.append(len(pairs)) or pairs for pairs in near_pairs(*args)),
    )
    assert duplicates(np.packbits(bits, axis=1)).tolist() == [0] * 3000
    assert sum(compared) < 3000 * 2999 / 2 / 10
