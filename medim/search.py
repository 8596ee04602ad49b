"""Search prepared studies by a picture or a text, in the space where a model's embeddings of both meet.

Shape letters: N studies, E embedding width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from medim.data import prepare
from medim.errors import UserError
from medim.metrics.retrieval import retrieval
from medim.metrics.statistics import Sums, interval
from medim.pipeline import MeDiM


@dataclass(frozen=True)
class Hit:
    """A study that was found; `likeness` is a cosine."""

    id: str
    likeness: float
    report: str
    picture: PIL.Image.Image


class Index:
    """Embeddings of the first image and of the report of each study of a prepared dataset.

    Args:
        data: studies of `medim.data.prepare.load`; those that lack either are left out.
        progress: called with the number of studies done since the last call.
    """

    def __init__(
        self, model: MeDiM, data: Dataset, batch_size: int = 32, progress: Callable[[int], None] | None = None
    ) -> None:
        self.model, self.data = model, data
        self.kept = [n for n, one in enumerate(data) if one["images"] and one["report"]]
        if not self.kept:
            raise UserError("no study there has both an image and a report")
        made, images, reports = model.embeddings(batch_size), [], []
        for first in range(0, len(self.kept), batch_size):
            part = [data[n] for n in self.kept[first : first + batch_size]]
            firsts = [one["images"][0] for one in part]
            images.append(made.rows([made.image(str(one["modality"]), one["codes"]) for one in firsts], "image"))
            reports.append(made.rows([made.report(str(one["report"])) for one in part], "text"))
            if progress is not None:
                progress(len(part))
        self.images: Float[Tensor, "N E"] = torch.cat(images)
        self.reports: Float[Tensor, "N E"] = torch.cat(reports)

    def search(self, query: Float[Tensor, "E"], n: int, among: str) -> list[Hit]:
        """The `n` studies whose `among` (images or reports) are nearest to an embedding, the nearest first."""
        likeness = (self.images if among == "images" else self.reports) @ query
        hits = []
        for place in likeness.argsort(descending=True, stable=True)[:n].tolist():
            one = self.data[self.kept[place]]
            first = one["images"][0]
            ids = np.asarray(first["codes"]) + self.model.joint.vocabulary.image[0]
            picture = self.model.joint.picture(ids, str(first["modality"]))
            hits.append(Hit(str(one["id"]), float(likeness[place]), str(one["report"]), picture))
        return hits

    def recall(self, seed: int = 0) -> dict[str, tuple[float, float, float]]:
        """Recall at 1, 5 and 10 of image to text and of text to image with 95% intervals over studies, and chance."""
        found: dict[str, tuple[float, float, float]] = {}
        for name, value in retrieval(self.images.numpy(), self.reports.numpy()).items():
            if isinstance(value, Sums):
                found[name] = (value.value, *interval(value, range(len(self.kept)), seed))
        return found

    @property
    def chance(self) -> float:
        """Recall at 1 of a guess."""
        return 1 / len(self.kept)


def open_data(folder: str | Path, model: MeDiM, split: str = "", patients: Sequence[str] = ()) -> Dataset:
    """The studies of a prepared dataset that are searched.

    Raises:
        UserError: no such dataset, one of another image tokenizer, or no study of the split or the patients.
    """
    data = prepare.load(folder, model.joint.image, split or None)
    if patients:
        unknown = set(patients) - set(data["patient_id"])
        if unknown:
            raise UserError(f"{folder}: no study of patient {sorted(unknown)[0]}")
        data = data.select([n for n, patient in enumerate(data["patient_id"]) if patient in patients])
    return data
