"""A small convolutional reader: which findings does an image show? Trained by `eval/train_reader.py`.

It measures whether a generated image agrees with a text. It is no diagnostic model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from medim.errors import UserError


class _Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(before, after, 4, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, after)
        self.conv = nn.Conv2d(after, after, 3, padding=1)

    def forward(self, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D h w"]:
        x = F.gelu(self.norm(self.down(x)))
        return x + F.gelu(self.conv(x))


class FindingReader(nn.Module):
    """Gray image [B, 1, side, side] in [-1, 1] -> one logit a finding. Places matter, so nothing is pooled globally."""

    threshold: Float[Tensor, "F"]  # on logits, chosen on validation images

    def __init__(self, findings: Sequence[str], side: int = 96, widths: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        self.findings, self.side, self.widths = tuple(findings), side, tuple(widths)
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in zip((1, *widths[:-1]), widths, strict=True)))
        self.head = nn.Linear(widths[-1] * (side // 2 ** len(widths)) ** 2, len(findings))
        self.register_buffer("threshold", torch.zeros(len(findings)))

    def forward(self, pixels: Float[Tensor, "B 1 H W"]) -> Float[Tensor, "B F"]:
        return self.head(self.blocks(pixels).flatten(1))

    def pixels(self, images: Sequence[PIL.Image.Image]) -> Float[Tensor, "B 1 H W"]:
        """Pictures as the network takes them."""
        size = (self.side, self.side)
        arrays = [np.asarray(i.convert("L").resize(size, PIL.Image.Resampling.BICUBIC), np.float32) for i in images]
        return torch.from_numpy(np.stack(arrays)).unsqueeze(1) / 127.5 - 1

    @torch.no_grad()
    def read(self, images: Sequence[PIL.Image.Image], batch_size: int = 64) -> list[dict[str, bool]]:
        """The findings that each picture shows, by name."""
        found: list[dict[str, bool]] = []
        for first in range(0, len(images), batch_size):
            logits = self(self.pixels(images[first : first + batch_size]))
            for row in (logits > self.threshold).tolist():
                found.append(dict(zip(self.findings, row, strict=True)))
        return found

    def save_pretrained(self, folder: str | Path, **card: object) -> None:
        """Write config.json (with what `card` says about its making) and model.safetensors."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        config = {"findings": self.findings, "side": self.side, "widths": self.widths, "card": card}
        (root / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        save_file({k: v.half() for k, v in self.state_dict().items()}, root / "model.safetensors")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> FindingReader:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: a file is missing.
        """
        root = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (root / name).is_file():
                raise UserError(f"finding reader {root}: {name} is missing")
        config = json.loads((root / "config.json").read_text())
        reader = cls(config["findings"], config["side"], config["widths"])
        reader.load_state_dict({k: v.float() for k, v in load_file(root / "model.safetensors").items()})
        return reader.eval()
