"""Images and reports by themselves as vectors of one space. Shape letters: N rows, E embedding width."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from medim.canvas import Canvas, Row, Segment, layout
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.model.medim import MeDiMModel
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import Kind


class Embeddings:
    """Embeds by a network that was trained with `objective.align`.

    Raises:
        UserError: it has no embeddings.
    """

    def __init__(self, network: MeDiMModel, joint: JointTokenizer, name: str, batch_size: int = 32) -> None:
        if not network.config.embed:
            raise UserError(f"{name}: has no embeddings; train one with model.embed and objective.align")
        self.network, self.joint, self.batch_size = network, joint, batch_size

    def of(self, images: Sequence[Image], reports: Sequence[str]) -> Float[Tensor, "N E"]:
        """Of images, then of reports.

        Raises:
            UserError: an image that cannot be read, an empty report.
        """
        if not all(report.strip() for report in reports):
            raise UserError("a report is empty: nothing to embed")
        pictures = [self.joint.encode(Study("", "", (Image(one.modality, one.pixels),), "")) for one in images]
        texts = [self.report(one) for one in reports]
        return torch.cat([self.rows(pictures, "image"), self.rows(texts, "text")])

    def report(self, text: str) -> Row:
        """A report by itself."""
        return layout([Segment("report", "text", self.joint.report_ids(text))], self.joint.vocabulary)

    def image(self, modality: str, codes: Sequence[int]) -> Row:
        """An image by itself, its codes not yet joint ids; its view is not told, as in training."""
        ids = [self.joint.vocabulary.image[0] + int(code) for code in codes]
        return layout([Segment("image", modality, ids)], self.joint.vocabulary)

    @torch.no_grad()
    def rows(self, rows: Sequence[Row], kind: Kind) -> Float[Tensor, "N E"]:
        """Of rows that hold one image, or one report, each; on the CPU."""
        parts = [torch.zeros(0, self.network.config.embed)]
        for first in range(0, len(rows), self.batch_size):
            part = rows[first : first + self.batch_size]
            canvas = Canvas.collate(part, self.joint.vocabulary.eos).to(self.network.device)
            parts.append(self.network.embed(canvas, kind).float().cpu())
        return torch.cat(parts)
