"""An image-text encoder that no scored model has trained with, and a local judge: both optional, both by transformers.

Nothing leaves the machine: images and reports are given to models that run here, as PhysioNet's terms ask.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from numpy import ndarray

from medim.errors import UserError

BATCH = 32
QUESTION = (
    "Here is a medical image and a report. Does the report describe this image? Answer with one digit from 1 (it does "
    "not) to 5 (all of it is right, and nothing visible is left out).\n\nReport: {report}\n\nDigit:"
)
LEAST, MOST = 1, 5


def load_encoder(
    name: str, device: str = "cpu"
) -> Callable[[Sequence[PIL.Image.Image], Sequence[str]], tuple[Float[ndarray, "N D"], Float[ndarray, "N D"]]]:
    """Vectors of images and of reports by a model of the CLIP family: one with get_image_features, get_text_features.

    Args:
        name: on the hub or a folder, such as openai/clip-vit-base-patch32 or vinid/plip. Long reports are cut.

    Raises:
        UserError: it cannot be loaded, or is no such model.
    """
    from transformers import AutoModel, AutoProcessor

    try:
        processor, network = AutoProcessor.from_pretrained(name), AutoModel.from_pretrained(name)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise UserError(f"encoder: {name} cannot be loaded ({_line(error)}); fetch it: hf download {name}") from error
    if not (hasattr(network, "get_image_features") and hasattr(network, "get_text_features")):
        raise UserError(f"encoder: {name} is a {type(network).__name__}, which has no vectors of images and of texts")
    network = network.to(device).eval()

    @torch.no_grad()
    def encode(
        images: Sequence[PIL.Image.Image], texts: Sequence[str]
    ) -> tuple[Float[ndarray, "N D"], Float[ndarray, "N D"]]:
        pictures, words = [], []
        for first in range(0, len(texts), BATCH):
            some = [image.convert("RGB") for image in images[first : first + BATCH]]
            pixels = processor(images=some, return_tensors="pt").to(device)
            given = list(texts[first : first + BATCH])
            ids = processor(text=given, padding=True, truncation=True, return_tensors="pt").to(device)
            pictures.append(_vectors(network.get_image_features(**pixels)))
            words.append(_vectors(network.get_text_features(**ids)))
        return np.concatenate(pictures), np.concatenate(words)

    return encode


def _vectors(found: Any) -> Float[ndarray, "B D"]:
    """Some versions give the vectors, others what holds them."""
    vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
    return vectors.float().cpu().numpy()


def load_judge(name: str, device: str = "cpu") -> Callable[[PIL.Image.Image, str], float | None]:
    """A vision-language model that says from 1 to 5 how well a report describes an image; None if it says no digit.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import pipeline

    try:
        answer = pipeline("image-text-to-text", model=name, device=device)
    except (OSError, ValueError, ImportError, KeyError, RuntimeError) as error:
        raise UserError(f"judge: {name} cannot be loaded ({_line(error)}); fetch it: hf download {name}") from error

    def judge(image: PIL.Image.Image, report: str) -> float | None:
        asked: list[dict[str, Any]] = [{"type": "image", "image": image.convert("RGB")}]
        asked.append({"type": "text", "text": QUESTION.format(report=report.strip() or "(empty)")})
        chat: Any = [{"role": "user", "content": asked}]
        said: Any = answer(text=chat, max_new_tokens=8, return_full_text=False)
        return rating(str(said[0]["generated_text"]))

    return judge


def rating(said: str) -> float | None:
    """The first number of an answer, if it is from 1 to 5."""
    found = re.search(r"\d+", said)
    return float(found[0]) if found and LEAST <= int(found[0]) <= MOST else None


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
