"""Losses that draw embeddings of images and texts together: pure functions of features, over one process or many.

Each returns this process's share of a global mean: the sum over processes is the loss, and so is that of gradients.
Shape letters: N pairs here, G pairs of all processes, E embedding width.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

TEMPERATURE = 0.07  # at the start (CLIP, arXiv 2103.00020)
MOST = math.log(100.0)  # of the log of 1 / temperature: beyond, training is unstable


def info_nce(
    images: Float[Tensor, "N E"], texts: Float[Tensor, "N E"], log_scale: Float[Tensor, ""], group: Int[Tensor, "N"]
) -> Float[Tensor, ""]:
    """Symmetric InfoNCE with text as the hub (MedM2G, arXiv 2403.04290, "central alignment"; CLIP, figure 3).

    -1/(2 G) sum over pairs i of log p(text i | image i) + log p(image i | text i), p a softmax of cosine likeness times
    exp(log_scale), clamped to 100, over the pairs of all processes. Candidates are those of the pair's own `group`, its
    modality: that an MRI is no X-ray is nothing to learn, and the cost grows as O(n) with the modalities, all of
    which meet the texts alone. A pair without another of its group adds 0; one of group -1 is none.

    Args:
        images, texts: of any length; row i of both is one pair.
    """
    images, texts = (torch.nn.functional.normalize(one.float(), dim=-1) for one in (images, texts))
    every_image, every_text, every_group = gathered(images), gathered(texts), gathered(group)
    real = group >= 0
    own = (torch.arange(len(group), device=group.device) + _first(group))[real]
    other = (group[:, None] != every_group[None, :])[real]
    scale = log_scale.float().clamp(max=MOST).exp()
    total = images.sum() * 0 + texts.sum() * 0
    for queries, candidates in ((images, every_text), (texts, every_image)):
        likeness = (scale * queries[real] @ candidates.T).masked_fill(other, -torch.inf)
        total = total + torch.nn.functional.cross_entropy(likeness, own, reduction="sum")
    return total / (2 * (every_group >= 0).sum().clamp(min=1))


def barlow_twins(
    one: Float[Tensor, "N E"], other: Float[Tensor, "N E"], group: Int[Tensor, "N"], off_diagonal: float = 0.005
) -> Float[Tensor, ""]:
    """Barlow Twins (Zbontar et al., arXiv 2103.03230, eq. 1) between two views of each image, by modality.

    sum_i (1 - C_ii)^2 + off_diagonal sum_{i != j} C_ij^2, with C the cross-correlation [E, E] over the images of all
    processes of one `group`, each feature standardised over them; the mean over groups, each as heavy as its images.
    Groups of one image are left out: nothing varies.
    """
    a, b, groups = gathered(one.float()), gathered(other.float()), gathered(group)
    total, counted = a.sum() * 0 + b.sum() * 0, 0
    for number in groups[groups >= 0].unique().tolist():
        here = groups == number
        count = int(here.sum())
        if count < 2:
            continue
        c = _standard(a[here]).T @ _standard(b[here]) / count
        error = (c - torch.eye(len(c), device=c.device)).square()
        weight = torch.full_like(c, off_diagonal).fill_diagonal_(1.0)
        total, counted = total + count * (weight * error).sum(), counted + count
    return total / max(1, counted) / _world()


def _standard(x: Float[Tensor, "M E"]) -> Float[Tensor, "M E"]:
    """Mean 0 and variance 1 of each feature."""
    centred = x - x.mean(0)
    return centred / (centred.square().mean(0) + 1e-6).sqrt()


def gathered(values: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow back to each."""
    if _world() == 1:
        return values
    sizes = _sizes(len(values), values.device)
    most = max(sizes)
    padded = torch.cat([values, values.new_zeros(most - len(values), *values.shape[1:])])
    if values.requires_grad:
        from torch.distributed.nn.functional import all_gather

        parts = list(all_gather(padded))
    else:
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def _sizes(size: int, device: torch.device) -> list[int]:
    """How many rows each process has."""
    found = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(_world())]
    dist.all_gather(found, torch.tensor([size], device=device))
    return [int(one) for one in found]


def _first(rows: Tensor) -> int:
    """The number of this process's first row among those of all."""
    return 0 if _world() == 1 else sum(_sizes(len(rows), rows.device)[: dist.get_rank()])


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
