"""What steps the weights: AdamW in four makes, or Muon for the matrices of the decoder's layers."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from medim.config import options
from medim.errors import UserError
from medim.model.backbone import decoder_layers
from medim.training.processes import multiplies_bf16

WHOLE = ("adamw_8bit", "muon")  # want whole matrices: one GPU or DDP


@options
class OptimizerOptions:
    """How the weights are stepped.

    Attributes:
        lr: of AdamW's weights, at its highest.
        muon_lr: of Muon's matrices, at its highest; an update has the root mean square of 0.2 times it, about that of
            AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2).
        optimizer: `adamw` is torch's fused one; `muon` steps the matrices of the decoder's layers by their
            orthogonalised momentum, all else by AdamW (not with ZeRO or FSDP); `adamw_8bit` keeps its moments in 8 bits
            (bitsandbytes; not with ZeRO or FSDP); `adamw_deepspeed` is DeepSpeed's fused one, for GPUs or for an
            optimizer that is offloaded.
    """

    lr: Annotated[float, Field(gt=0)] = 1e-3
    muon_lr: Annotated[float, Field(gt=0)] = 8e-3
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.01
    optimizer: Literal["adamw", "muon", "adamw_8bit", "adamw_deepspeed"] = "adamw"


class Muon(torch.optim.Optimizer):
    """torch's Muon for matrices and its AdamW for all else, as one optimizer with one state.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) adds the nearest semi-orthogonal matrix of a momentum,
    so that all its directions are learnt equally fast. Groups of matrices have a ``scale``: `muon_lr` over `lr`.
    """

    def __init__(self, matrices: Sequence[Tensor], others: Sequence[dict[str, Any]], o: OptimizerOptions) -> None:
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            how: dict[str, Any] = {"weight_decay": o.weight_decay, "adjust_lr_fn": "match_rms_adamw"}
            self.parts.append(torch.optim.Muon(matrices, lr=o.muon_lr, **how))
            self.parts[0].param_groups[0]["scale"] = o.muon_lr / o.lr
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=o.lr, betas=o.betas, eps=o.eps, fused=True))
        groups = [group for part in self.parts for group in part.param_groups]
        super().__init__(groups, {"fused": True})
        self.param_groups = groups
        self.state: defaultdict[Tensor, Any] = defaultdict(dict)
        for part in self.parts:
            part.state = self.state

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of both.

        Raises:
            ValueError: with a closure.
        """
        if closure is not None:
            raise ValueError("Muon takes no closure")
        for part in self.parts:
            if isinstance(part, torch.optim.Muon) and not multiplies_bf16():
                _muon_step_in_float32(part)
            else:
                part.step()


@torch.no_grad()
def _muon_step_in_float32(muon: torch.optim.Muon) -> None:
    """What `torch.optim.Muon.step` does always in bf16: emulated, that takes most of the time of a step."""
    for group in muon.param_groups:
        for weight in (weight for weight in group["params"] if weight.grad is not None):
            momentum = muon.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
            momentum.lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(momentum, group["momentum"])  # Nesterov's
            update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * 0.2 * max(weight.shape) ** 0.5)  # Liu et al. 2025, eq. 4


def orthogonalised(
    x: Float[Tensor, "M N"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "M N"]:
    """U f(S) V^T of U S V^T, with f(S) about 1: Newton-Schulz iterations of S / |S|, each a S + b S^3 + c S^5 (Jordan
    2024)."""
    a, b, c = coefficients
    wide = x.T if x.shape[0] > x.shape[1] else x
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.T if x.shape[0] > x.shape[1] else wide


def make_optimizer(model: nn.Module, o: OptimizerOptions) -> torch.optim.Optimizer:
    """Of the trained weights; decay on matrices only.

    Raises:
        UserError: the optimizer's package is not installed, or older than the optimizer.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    taken = muon_matrices(model) if o.optimizer == "muon" else []
    seen = {id(p) for p in taken}
    matrices = [p for p in trained if _dim(p) >= 2 and id(p) not in seen]
    others = [p for p in trained if _dim(p) < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if o.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, eps=o.eps, fused=True)
    if o.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise UserError(
                f"train.optimizer=muon: torch {torch.__version__} is older than Muon: pip install 'torch>=2.9'"
            )
        return Muon(taken, groups, o)
    try:
        if o.optimizer == "adamw_8bit":
            from bitsandbytes.optim import AdamW8bit

            return AdamW8bit(groups, lr=o.lr, betas=o.betas, eps=o.eps)
        from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
    except ImportError as error:
        package = {"adamw_8bit": "bitsandbytes"}.get(o.optimizer, "deepspeed")
        raise UserError(f"train.optimizer={o.optimizer}: {package} is not installed: pip install {package}") from error
    return (FusedAdam if torch.cuda.is_available() else DeepSpeedCPUAdam)(groups, lr=o.lr, betas=o.betas, eps=o.eps)


def muon_matrices(model: nn.Module) -> list[Tensor]:
    """What Muon steps: the trained matrices of linear layers inside the decoder's layers."""
    backbone: Any = model.backbone
    linears = [m for layer in decoder_layers(backbone) for m in layer.modules() if isinstance(m, nn.Linear)]
    return [linear.weight for linear in linears if linear.weight.requires_grad]


def newton_schulz_flops(model: nn.Module) -> float:
    """FLOPs of a step's orthogonalisations: for a matrix [m, n] with m <= n, each iteration multiplies [m, n] by its
    transpose, the result by itself, and that by [m, n]."""
    iterations = int(inspect.signature(torch.optim.Muon).parameters["ns_steps"].default)
    sides = [sorted(matrix.shape) for matrix in muon_matrices(model)]
    return float(sum(iterations * (4 * m * m * n + 2 * m**3) for m, n in sides))


def _dim(parameter: Tensor) -> int:
    return len(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 leaves an empty tensor of dimension 1
