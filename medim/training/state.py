"""What VQ training keeps of a network in one process: its averaged weights, its optimizer's moments."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Moments = dict[str, Tensor]


class EMA:
    """Exponential moving average of the weights: e <- d e + (1 - d) w; d rises to `decay` over the first steps."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Fold in the weights after `step` updates."""
        decay = min(self.decay, (1 + step) / (10 + step))
        ours, theirs = [], []
        for name, value in model.named_parameters():
            ours.append(self.weights[name])
            theirs.append(value.detach().to(self.weights[name].dtype))
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Put the average in the place of the weights."""
        for name, value in model.named_parameters():
            value.copy_(self.weights[name])


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> Moments:
    """The optimizer's state as named tensors: ``<parameter>/<field>``."""
    names = {id(p): name for name, p in model.named_parameters()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for field, value in state.items():
            tensors[f"{names[id(parameter)]}/{field}"] = torch.as_tensor(value).detach().clone().contiguous()
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        optimizer.state[parameters[name]][field] = value.to(parameters[name].device)
