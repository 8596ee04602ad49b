"""The task that the loop trains: a prepared dataset, the joint tokenizer, the objective and the model."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from datasets import Dataset
from torch import nn

from medim.canvas import Canvas, Row, Segment, layout
from medim.data.order import Order, share
from medim.model.flops import Work
from medim.model.lora import check_sharing
from medim.model.medim import MeDiMModel
from medim.objective import Batch, Loss, ObjectiveOptions, count, loss, make_batch
from medim.tokenization.joint import JointTokenizer
from medim.training.validation import Validation
from medim.training.weights import Source

Slots = dict[str, dict[int, int]]
SLOT_SAMPLE = 5000  # studies that the histogram is taken from


class Rows:
    """Stored studies as rows.

    Args:
        images: images of a study on one canvas, at most.
        fits: the stored ids of reports are those of the joint tokenizer; else reports are encoded when they are needed.
        domain: the image modality whose reports those without an image are; empty: of none.
    """

    def __init__(
        self, joint: JointTokenizer, data: Sequence[Dataset], images: int = 1, fits: bool = False, domain: str = ""
    ) -> None:
        self.joint, self.data, self.images, self.fits, self.domain = joint, list(data), images, fits, domain

    def row(self, source: int, index: int, turn: int = 0) -> Row:
        """One study as a row; of more images than fit, those from number `turn` on."""
        record = self.data[source][index]
        kept = record["images"]
        if len(kept) > self.images:
            first = turn % len(kept)
            kept = [*kept[first:], *kept[:first]][: self.images]
        segments = [
            Segment("image", str(one["modality"]), self.joint.code_ids(np.asarray(one["codes"]))) for one in kept
        ]
        if record["report"]:
            segments.append(Segment("report", "text", self.report_ids(record)))
        return layout(segments, self.joint.vocabulary)

    def report_ids(self, record: Mapping[str, Any]) -> list[int]:
        """Ids of a stored report in its slot."""
        report = str(record["report"])
        return self.joint.report_ids(report, ids=[int(i) for i in record["report_ids"]] if self.fits else None)

    def slots(self) -> Slots:
        """How often each slot length occurs, by modality, in the first `SLOT_SAMPLE` studies of each source."""
        counters: dict[str, Counter[int]] = {}
        for data in self.data:
            for record in data.select(range(min(len(data), SLOT_SAMPLE))):
                if record["report"]:
                    length = len(self.report_ids(record))
                    for modality in {str(one["modality"]) for one in record["images"]} or {self.domain} - {""}:
                        counters.setdefault(modality, Counter())[length] += 1
        return {modality: dict(sorted(counter.items())) for modality, counter in counters.items()}


class DiffusionTask:
    """Masked diffusion over prepared studies."""

    def __init__(
        self,
        model: MeDiMModel,
        rows: Rows,
        order: Order,
        objective: ObjectiveOptions,
        batch_size: int,
        seed: int,
        write: Callable[[Path, MeDiMModel, Slots], None],
        pack: int = 0,
        stored: Source | None = None,
        validation: Validation | None = None,
        draw: Callable[[MeDiMModel, Slots], PIL.Image.Image] | None = None,
    ) -> None:
        """`model` may be a skeleton, whose weights are in `stored`, or are drawn if that is None.

        `write` makes a model folder without weights, given the histogram of report slots it was trained on.
        `draw` samples a few pairs and makes a contact sheet of them.

        `pack`: positions of a row that holds several studies; 0: one study a row, padded.
        """
        self.model, self.rows, self.order, self.objective = model, rows, order, objective
        self.batch_size, self.seed, self.write, self.pack, self.stored = batch_size, seed, write, pack, stored
        self.validation, self._draw = validation, draw

    def batches(self, step: int, rank: int, world: int, parts: int) -> list[Batch]:
        """This process's share of a step in `parts`: a pure function of (seed, step)."""
        chosen = self.order.batch(step, self.batch_size)
        mine = np.arange(self.batch_size)[share(self.batch_size, rank, world)]
        return [self._batch(step, chosen, places) for places in np.array_split(mine, parts)]

    def _batch(self, step: int, chosen: tuple[np.ndarray, np.ndarray], places: np.ndarray) -> Batch:
        first, (sources, studies) = step * self.batch_size, chosen
        rows = [self.rows.row(int(sources[p]), int(studies[p]), first + int(p)) for p in places]
        joint = self.rows.joint
        fill, mask_id = joint.vocabulary.eos, joint.vocabulary.mask
        canvas = Canvas.pack(rows, fill, self.pack) if self.pack else Canvas.collate(rows, fill)
        return make_batch(canvas, places.tolist(), self.batch_size, step, self.seed, self.objective, mask_id)

    def count(self, batch: Batch) -> float:
        """What the loss is divided by."""
        return count(batch, self.objective)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The objective on one batch."""
        return loss(model, batch, self.objective)

    def save(self, folder: Path) -> None:
        """All of a model folder but the weights: config, tokenizers, histogram of report slots, sampling defaults."""
        self.write(folder, self.model, self.slots)

    def studies(self, step: int) -> list[str]:
        """Ids of the studies of a step."""
        sources, studies = self.order.batch(step, self.batch_size)
        return [str(self.rows.data[s][int(i)]["id"]) for s, i in zip(sources, studies, strict=True)]

    def work(self, batch: Batch) -> Work:
        """What the mathematics must do for a batch."""
        return Work.of(batch.canvas, batch.rows, self.model.attention_backend, batch.given)

    def draw(self, model: nn.Module) -> PIL.Image.Image | None:
        """The contact sheet of a few pairs, always of the same noise."""
        assert isinstance(model, MeDiMModel)
        return None if self._draw is None else self._draw(model, self.slots)

    def check_sharing(self, way: str, divides_weights: bool) -> None:
        """Refuse adapters over a model that cannot be shared so."""
        if self.model.lora is not None:
            check_sharing(self.model.lora.options, way, not divides_weights)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of the studies follows from, beside the config."""
        return {"studies": list(self.order.sizes), "shares": list(self.order.shares)}

    @functools.cached_property
    def slots(self) -> Slots:
        """How often each slot length occurs in training, by modality: what sampling draws lengths from."""
        return self.rows.slots()
