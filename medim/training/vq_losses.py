"""What a reconstruction is compared by: perceptual distances, a patch discriminator and its weight.

Shape letters: B batch, H W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from medim.errors import UserError
from medim.metrics.features import efficientnet_lite0

Perceptual = Literal["none", "efficientnet-lite0", "lpips"]
Distance = Callable[[Tensor, Tensor], Tensor]


class EfficientNetDistance(nn.Module):
    """Mean squared distance of channel-unit-normalised features of EfficientNet-lite0 after strides 2, 4 and 8.

    The form is LPIPS without its learnt weights (Zhang et al. 1801.03924, equation 1).
    """

    STAGES = (0, 2, 4)  # the last block at each of the strides

    def __init__(self) -> None:
        super().__init__()
        network = efficientnet_lite0()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.ModuleList(network._blocks[: self.STAGES[-1] + 1])
        self.requires_grad_(False).eval()

    def features(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """One unit-normalised map a stage; pixels in [-1, 1], which is the network's own scale."""
        hidden, found = self.stem(pixels), []
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if index in self.STAGES:
                found.append(functional.normalize(hidden.float(), dim=1))
        return found

    def forward(self, first: Float[Tensor, "B 3 H W"], second: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
        """0 for equal pictures, at most 4."""
        with torch.no_grad():
            target = self.features(second)
        pairs = zip(self.features(first), target, strict=True)
        return torch.stack([(a - b).square().sum(dim=1).mean() for a, b in pairs]).mean()


def make_distance(name: Perceptual, device: torch.device) -> Distance | None:
    """The perceptual distance of that name, None for "none".

    Raises:
        ImportError: a package is missing; the text holds the pip line.
    """
    if name == "none":
        return None
    if name == "efficientnet-lite0":
        return EfficientNetDistance().to(device)
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise ImportError(
            "loss.perceptual=lpips needs: pip install --no-deps lpips, and a torchvision that fits your torch"
        ) from error
    network = LPIPS(net="vgg", verbose=False).to(device).requires_grad_(False).eval()
    return lambda first, second: network(first, second).mean()


def make_discriminator(layers: int, channels: int) -> nn.Module:
    """taming's patch discriminator with its own initial weights: a map of logits, real is positive."""
    from taming.modules.discriminator.model import NLayerDiscriminator, weights_init

    return NLayerDiscriminator(input_nc=3, ndf=channels, n_layers=layers).apply(weights_init)


def hinge(real: Tensor, made: Tensor) -> Float[Tensor, ""]:
    """The discriminator's loss: half of mean(max(0, 1 - real)) + mean(max(0, 1 + made))."""
    return 0.5 * (functional.relu(1.0 - real).mean() + functional.relu(1.0 + made).mean())


def adaptive_weight(
    reconstruction: Float[Tensor, ""], adversarial: Float[Tensor, ""], last: Tensor
) -> Float[Tensor, ""]:
    """|d reconstruction / d last| / (|d adversarial / d last| + 1e-4), at most 1e4: both losses pull equally there.

    Source: 2012.09841, equation 7; the constants are those of taming's code.

    Args:
        last: weights of the decoder's last layer.

    Raises:
        UserError: a gradient is not a number.
    """
    ours, theirs = (
        torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, adversarial)
    )
    weight = (ours / (theirs + 1e-4)).clamp(0.0, 1e4).detach()
    if not bool(torch.isfinite(weight)):
        raise UserError("the gradient of the reconstruction is no longer a number; lower train.lr and start anew")
    return weight
