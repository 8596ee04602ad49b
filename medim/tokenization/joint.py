"""Study -> row of ids -> study: the two tokenizers and the vocabulary that joins them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from jaxtyping import Int
from torch import Tensor

from medim.canvas import ROLES, Row, Segment, layout
from medim.config import options
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.tokenization.image import VQTokenizer
from medim.tokenization.text import TextTokenizer
from medim.vocabulary import MODALITIES, Vocabulary


@options
class SlotOptions:
    """A report's slot: its ids, ``<eos>``, and ``<eos>`` up to a multiple of `multiple`; `longest` is the limit."""

    multiple: int = 16
    longest: int = 256


@dataclass(frozen=True)
class JointTokenizer:
    """Both tokenizers in one vocabulary."""

    text: TextTokenizer
    image: VQTokenizer
    vocabulary: Vocabulary
    slot: SlotOptions

    @classmethod
    def build(
        cls,
        text: TextTokenizer,
        image: VQTokenizer,
        slot: SlotOptions,
        rows: int = 0,
        first_code: int | None = None,
        views: Sequence[str] | None = None,
    ) -> JointTokenizer:
        """Join two tokenizers in a new vocabulary, after the `rows` rows of a backbone, which may have codes' rows.

        Args:
            views: words of views that get a tag; None: all.
        """
        vocabulary = Vocabulary.build(text.size, text.eos, image.codebook_size, rows, first_code, views)
        return cls(text, image, vocabulary, slot)

    def report_ids(self, report: str, length: int | None = None, ids: list[int] | None = None) -> list[int]:
        """Ids of a report in its slot, `length` positions or as few as its multiple allows; cut if it is too long.

        `ids`, if given, are those of the report, encoded before.
        """
        ids = self.text.encode(report) if ids is None else ids
        if length is None:
            wanted = -(-(len(ids) + 1) // self.slot.multiple) * self.slot.multiple
            length = min(wanted, self.slot.longest)
        return (ids[: length - 1] + [self.text.eos] * length)[:length]

    def code_ids(self, codes: Int[Tensor, "h w"] | np.ndarray) -> list[int]:
        """Joint ids of a code grid, row by row."""
        return (np.asarray(codes, dtype=np.int64).ravel() + self.vocabulary.image[0]).tolist()

    def image_codes(self, image: Image) -> Int[Tensor, "h w"]:
        """Codes of one image after `prepare_image`."""
        return self.image.encode(self.image.prepare(image.pixels, MODALITIES[image.modality].gray))

    def encode(self, study: Study) -> Row:
        """The row of a study: images, then the report unless it is empty."""
        segments = [Segment("image", i.modality, self.code_ids(self.image_codes(i)), i.view) for i in study.images]
        if study.report:
            segments.append(Segment("report", "text", self.report_ids(study.report)))
        return layout(segments, self.vocabulary)

    def decode(self, ids: Sequence[int] | np.ndarray, row: Row, name: str = "") -> Study:
        """Ids on the layout of `row` as a study: codes to pictures, text to a report. The inverse of `encode`."""
        values = np.asarray(ids)
        images, report = [], ""
        for number, role in enumerate(row.roles):
            where = np.flatnonzero(row.segment == number)
            if ROLES[role] == "image":
                modality = row.modalities[number]
                images.append(Image(modality, self.picture(values[where], modality), row.views[number]))
            else:
                report = self.text.decode(values[where].tolist())
        return Study(id=name, patient_id=name, images=tuple(images), report=report)

    @property
    def codes(self) -> int:
        """Codes of an image."""
        return math.prod(self.image.grid(self.image.config.resolution, self.image.config.resolution))

    def grid(self, ids: np.ndarray) -> Int[Tensor, "h w"]:
        """Joint ids of a whole image segment as its code grid."""
        h, w = self.image.grid(self.image.config.resolution, self.image.config.resolution)
        return torch.from_numpy(np.asarray(ids) - self.vocabulary.image[0]).view(h, w)

    def picture(self, ids: np.ndarray, modality: str) -> PIL.Image.Image:
        """The picture of an image segment; gray modalities come out gray."""
        picture = self.image.decode(self.grid(ids), gray=MODALITIES[modality].gray)
        assert isinstance(picture, PIL.Image.Image)
        return picture

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``text_tokenizer/``, ``image_tokenizer/`` and ``canvas.json``."""
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        self.text.save_pretrained(root / "text_tokenizer")
        self.image.save_pretrained(root / "image_tokenizer")
        data = {
            "slot": {"multiple": self.slot.multiple, "longest": self.slot.longest},
            "vocabulary": self.vocabulary.to_dict(),
        }
        (root / "canvas.json").write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> JointTokenizer:
        """Read what `save_pretrained` wrote.

        Raises:
            UserError: a part is missing, or the vocabulary is not that of the two tokenizers.
        """
        root = Path(folder)
        if not (root / "canvas.json").is_file():
            raise UserError(f"{root}: not a MeDiM model folder: canvas.json is missing")
        try:
            data = json.loads((root / "canvas.json").read_text())
            slot = SlotOptions(**data["slot"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{root / 'canvas.json'}: damaged ({error})") from error
        text = TextTokenizer.from_pretrained(root / "text_tokenizer")
        image = VQTokenizer.from_pretrained(root / "image_tokenizer")
        vocabulary = Vocabulary.from_dict(data.get("vocabulary", {}))
        vocabulary.check(text.size, text.eos, image.codebook_size, str(root))
        return cls(text, image, vocabulary, slot)
