"""The task that the loop trains: a prepared dataset, the joint tokenizer, the objective and the model."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from datasets import Dataset
from torch import nn

from medim.canvas import Canvas, Row, Segment, layout
from medim.data.order import global_batch, share
from medim.model.medim import MeDiMModel
from medim.objective import Batch, Loss, ObjectiveOptions, count, loss, make_batch
from medim.tokenization.joint import JointTokenizer

Slots = dict[str, dict[int, int]]
SLOT_SAMPLE = 5000  # studies that the histogram is taken from


class DiffusionTask:
    """Masked diffusion over prepared studies."""

    def __init__(
        self,
        model: MeDiMModel,
        joint: JointTokenizer,
        data: Dataset,
        objective: ObjectiveOptions,
        batch_size: int,
        seed: int,
        write: Callable[[Path, MeDiMModel, Slots], None],
        pack: int = 0,
    ) -> None:
        """`write` makes a self-contained folder of a model, given the histogram of report slots it was trained on.

        `pack`: positions of a row that holds several studies; 0: one study a row, padded.
        """
        self.model = model
        self.joint, self.data, self.objective = joint, data.with_format("numpy"), objective
        self.batch_size, self.seed, self.write, self.pack = batch_size, seed, write, pack

    def row(self, index: int) -> Row:
        """One stored study as a row."""
        record = self.data[index]
        segments = [Segment("image", str(record["modality"]), self.joint.code_ids(record["codes"]))]
        if record["report"]:
            segments.append(Segment("report", "text", self.joint.report_ids(str(record["report"]))))
        return layout(segments, self.joint.vocabulary)

    def batches(self, step: int, rank: int, world: int, parts: int) -> list[Batch]:
        """This process's share of a step in `parts`: a pure function of (seed, step)."""
        indices = global_batch(self.seed, step, self.batch_size, len(self.data))
        mine = np.arange(self.batch_size)[share(self.batch_size, rank, world)]
        return [self._batch(step, indices, places) for places in np.array_split(mine, parts)]

    def _batch(self, step: int, indices: np.ndarray, places: np.ndarray) -> Batch:
        rows, fill = [self.row(int(indices[p])) for p in places], self.joint.vocabulary.eos
        canvas = Canvas.pack(rows, fill, self.pack) if self.pack else Canvas.collate(rows, fill)
        mask_id = self.joint.vocabulary.mask
        return make_batch(canvas, places.tolist(), self.batch_size, step, self.seed, self.objective, mask_id)

    def count(self, batch: Batch) -> float:
        """What the loss is divided by."""
        return count(batch, self.objective)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The objective on one batch."""
        return loss(model, batch, self.objective)

    def save(self, folder: Path, model: nn.Module) -> None:
        """A self-contained folder: config, weights, both tokenizers, histogram of report slots, sampling defaults."""
        assert isinstance(model, MeDiMModel)
        self.write(folder, model, self.slots)

    @functools.cached_property
    def slots(self) -> Slots:
        """How often each slot length occurs in training, by modality: what sampling draws lengths from."""
        counters: dict[str, Counter[int]] = {}
        for record in self.data.select(range(min(len(self.data), SLOT_SAMPLE))):
            if record["report"]:
                length = len(self.joint.report_ids(str(record["report"])))
                counters.setdefault(str(record["modality"]), Counter())[length] += 1
        return {modality: dict(sorted(counter.items())) for modality, counter in counters.items()}
