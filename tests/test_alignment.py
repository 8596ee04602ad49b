"""InfoNCE and Barlow Twins against closed forms, and over processes against plain sums."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from medim.alignment import barlow_twins, gathered, info_nce

ONE = torch.zeros(4, dtype=torch.long)


def test_info_nce_of_orthogonal_pairs() -> None:
    """Each text is its image and orthogonal to the others: -log(e^s / (e^s + 3)) both ways, whatever the lengths."""
    images, scale = torch.eye(4) * torch.tensor([[1.0], [2.0], [0.5], [9.0]]), torch.tensor(math.log(5.0))
    wanted = math.log(math.exp(5) + 3) - 5
    assert info_nce(images, torch.eye(4), scale, ONE).item() == pytest.approx(wanted, rel=1e-6)
    assert info_nce(torch.ones(4, 3), torch.ones(4, 3), scale, ONE).item() == pytest.approx(math.log(4))
    clamped = math.log(math.exp(100 - 100) + 3 * math.exp(-100.0))
    assert info_nce(torch.eye(4), torch.eye(4), torch.tensor(50.0), ONE).item() == pytest.approx(clamped, abs=1e-6)


def test_info_nce_compares_within_a_modality_only() -> None:
    images, texts = torch.randn(6, 5), torch.randn(6, 5)
    group, scale = torch.tensor([0, 1, 0, 1, 0, 2]), torch.tensor(1.0)
    parts = [info_nce(images[group == g], texts[group == g], scale, group[group == g]) for g in range(3)]
    whole = (3 * parts[0] + 2 * parts[1] + parts[2]) / 6
    assert torch.allclose(info_nce(images, texts, scale, group), whole) and parts[2] == 0
    none = torch.tensor([0, 1, 0, 1, 0, -1])
    assert torch.allclose(info_nce(images, texts, scale, none), (3 * parts[0] + 2 * parts[1]) / 5)
    assert info_nce(images, texts, scale, torch.full((6,), -1)) == 0


def test_barlow_twins_closed_forms() -> None:
    """White features: 0 with themselves, 4 E when turned round, E with independent ones; one copied feature: 2 off."""
    white = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    assert barlow_twins(white, white, ONE).item() == pytest.approx(0, abs=1e-4)
    assert barlow_twins(3 * white + 7, white, ONE).item() == pytest.approx(0, abs=1e-4)
    assert barlow_twins(white, -white, ONE).item() == pytest.approx(8, rel=1e-4)
    copied = white[:, :1].expand(4, 2)
    assert barlow_twins(copied, copied, ONE, off_diagonal=0.25).item() == pytest.approx(0.5, rel=1e-4)
    crossed = white.flip(1)
    assert barlow_twins(white, crossed, ONE, off_diagonal=0.25).item() == pytest.approx(2 + 0.5, rel=1e-4)
    two = torch.cat([white, -white]), torch.cat([white, white]), torch.tensor([0] * 4 + [1] * 4)
    assert barlow_twins(*two).item() == pytest.approx(4, rel=1e-4)
    assert barlow_twins(white, white, torch.arange(4)) == 0


def _features(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0, 1, 0, 0, 1, -1, 1])
    return torch.randn(7, 4, generator=generator), torch.randn(7, 4, generator=generator), group


def _rank(rank: int, world: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(world)}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    a, b, group = _features()
    here = slice(0, 3) if rank == 0 else slice(3, 7)
    a, b = a.requires_grad_(), b.requires_grad_()
    scale = torch.tensor(1.0, requires_grad=True)
    losses = [info_nce(a[here], b[here], scale, group[here]), barlow_twins(a[here], b[here], group[here])]
    sum(losses).backward()
    assert torch.equal(gathered(group[here]), group)
    torch.save([[one.detach() for one in losses], a.grad, b.grad, scale.grad], f"{folder}/{rank}.pt")
    dist.barrier()  # a process that leaves while another still talks to it aborts that one
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Losses and gradients of processes with unequal shares add up to those of one process."""
    a, b, group = _features()
    a, b, scale = a.requires_grad_(), b.requires_grad_(), torch.tensor(1.0, requires_grad=True)
    losses = [info_nce(a, b, scale, group), barlow_twins(a, b, group)]
    sum(losses).backward()
    mp.spawn(_rank, (2, str(tmp_path)), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for number, one in enumerate(losses):
        assert torch.allclose(found[0][0][number] + found[1][0][number], one.detach(), atol=1e-6)
    for number, value in ((1, a.grad), (2, b.grad), (3, scale.grad)):
        assert torch.allclose(found[0][number] + found[1][number], value, atol=1e-6)
