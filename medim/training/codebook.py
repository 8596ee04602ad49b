"""A codebook that follows the encoder by moving averages; all processes hold the same one.

Shape letters: N encoder outputs of this process, K codes, E codebook width.
"""

from __future__ import annotations

import torch
from accelerate.utils import broadcast, gather, reduce
from jaxtyping import Float, Int
from torch import Tensor, nn

RESTARTED = 0.3  # share of the mean use that a restarted code begins with
LLOYD = 8  # iterations of k-means after k-means++
ROWS = 4096  # vectors whose distances to all codes are in memory at once


class EMACodebook:
    """Moving averages of how often each code is chosen (K) and of what was chosen for it (K, E).

    Source: 1711.00937, appendix A.1: N <- g N + (1-g) n, m <- g m + (1-g) sum(z), e = m / N. Every method is called by
    all processes; n and sum(z) are sums over them.

    Attributes:
        counts: N in units of the mean use of a code.
        sums: m in the same units.
    """

    def __init__(self, embedding: nn.Embedding, decay: float) -> None:
        self.embedding = embedding.requires_grad_(False)
        self.decay = decay
        self.counts = torch.ones_like(embedding.weight[:, 0])
        self.sums = embedding.weight.detach().clone()

    @torch.no_grad()
    def start(self, vectors: Float[Tensor, "N E"], seed: int) -> None:
        """k-means++ of at most 8 encoder outputs a code, of all processes; the first process decides."""
        size, weight = self.embedding.num_embeddings, self.embedding.weight
        everyone = gather(vectors.float().contiguous())
        generator = torch.Generator(everyone.device).manual_seed(seed)
        order = torch.randperm(len(everyone), generator=generator, device=everyone.device)
        centres, use = kmeans(everyone[order[: 8 * size]], size, generator)
        weight.copy_(broadcast(centres.to(weight)))
        self.counts = broadcast((use * size / use.sum()).clamp(min=0.1).to(weight))
        self.sums = weight * self.counts[:, None]

    @torch.no_grad()
    def update(self, vectors: Float[Tensor, "N E"], codes: Int[Tensor, " N"]) -> Float[Tensor, " K"]:
        """One step; returns how often each code was chosen in it, in units of the mean."""
        size = self.embedding.num_embeddings
        use = reduce(torch.bincount(codes, minlength=size).to(self.counts), "sum")
        sums = reduce(torch.zeros_like(self.sums).index_add_(0, codes, vectors.to(self.sums)), "sum")
        share = size / use.sum()
        self.counts.lerp_(use * share, 1 - self.decay)
        self.sums.lerp_(sums * share, 1 - self.decay)
        self.embedding.weight.copy_(self.sums / self.counts[:, None].clamp(min=1e-5))
        return use * share

    @torch.no_grad()
    def restart_dead(self, vectors: Float[Tensor, "N E"], seed: int, below: float = 0.03) -> int:
        """Moves codes chosen less than `below` times the mean to random `vectors` of all processes; returns how many.

        All processes have the same `counts`, so all come to the same end.
        """
        dead = (self.counts < below).nonzero()[:, 0]
        if len(dead):
            everyone = gather(vectors.to(self.sums).contiguous())
            chosen = torch.randint(len(everyone), (len(dead),), generator=torch.Generator().manual_seed(seed))
            picked = everyone[chosen.to(everyone.device)]
            self.embedding.weight[dead] = picked
            self.counts[dead] = RESTARTED
            self.sums[dead] = picked * RESTARTED
        return len(dead)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside the codebook itself."""
        return {"counts": self.counts, "sums": self.sums}

    def load(self, counts: Float[Tensor, " K"], sums: Float[Tensor, "K E"]) -> None:
        """The inverse of `tensors`."""
        self.counts, self.sums = counts.to(self.counts), sums.to(self.sums)


def kmeans(
    data: Float[Tensor, "N E"], size: int, generator: torch.Generator
) -> tuple[Float[Tensor, "K E"], Float[Tensor, " K"]]:
    """`size` centres by k-means++ and Lloyd's iterations, and how many vectors each has; O(N K E) on the data's device.

    Source: Arthur and Vassilvitskii, "k-means++" (SODA 2007). scipy's is O(N K^2 E): hours at K=8192.
    """
    centres = data[torch.randint(len(data), (size,), generator=generator, device=data.device)]
    nearest = (data - centres[0]).square().sum(1)
    for i in range(1, size):
        centres[i] = data[torch.multinomial(nearest.clamp(min=1e-12), 1, generator=generator)[0]]
        nearest = torch.minimum(nearest, (data - centres[i]).square().sum(1))
    use = torch.zeros(size, device=data.device)
    for _ in range(LLOYD):
        labels = torch.cat([torch.cdist(part, centres).argmin(1) for part in data.split(ROWS)])
        use = torch.bincount(labels, minlength=size).to(data)
        sums = torch.zeros_like(centres).index_add_(0, labels, data)
        centres = torch.where(use[:, None] > 0, sums / use.clamp(min=1)[:, None], centres)
    return centres, use


def perplexity(use: Tensor) -> float:
    """exp of the entropy of code use: K when all codes are chosen alike."""
    return float(torch.special.entr(use.double() / use.sum().clamp(min=1e-9)).sum().exp())
