"""The task that the loop trains: a prepared dataset, the joint tokenizer, the objective and the model."""

from __future__ import annotations

import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from datasets import Dataset
from torch import nn

from medim.canvas import Canvas, Row, Segment, layout
from medim.data.order import Order, share
from medim.data.prepare import AUGMENTED
from medim.model.flops import Work
from medim.model.lora import check_sharing
from medim.model.medim import MeDiMModel
from medim.objective import Alone, Batch, Loss, ObjectiveOptions, count, loss, make_batch
from medim.tokenization.joint import JointTokenizer
from medim.training.validation import Validation
from medim.training.weights import Source
from medim.vocabulary import KINDS, MODALITIES, view_order

Slots = dict[str, dict[int, int]]
Views = dict[str, dict[str, int]]
SAMPLE = 5000  # studies that the histograms are taken from


@dataclass(frozen=True)
class Shown:
    """What of a study is on its canvas.

    Attributes:
        images: images of a study on one canvas, at most; of more, others in each epoch.
        absent: probability that an image, or the report, is left out: teaches to make one from any of the others.
        untold: probability that a word of the views that all of the images share is left untold.
        domain: the image modality of reports without an image (for the lengths of their slots); empty: none.
    """

    images: int = 1
    absent: float = 0.0
    untold: float = 0.0
    domain: str = ""


class Rows:
    """Stored studies as rows.

    Args:
        fits: the stored ids of reports are those of the joint tokenizer; else reports are encoded when they are needed.
        shown: what of a study is on its canvas.
    """

    def __init__(
        self, joint: JointTokenizer, data: Sequence[Dataset], shown: Shown | None = None, fits: bool = False
    ) -> None:
        self.joint, self.data, self.shown, self.fits = joint, list(data), shown or Shown(), fits

    def row(
        self, source: int, index: int, turn: int = 0, rng: np.random.Generator | None = None, show: Sequence[str] = ()
    ) -> Row:
        """One study as a row; of more images than fit, those from number `turn` on, in the order of the views' table.

        `rng` draws what is left out (`Shown`); without it, nothing is. `show` has words of what may be shown at all:
        text, modalities, words of views; none: all.
        """
        record, o = self.data[source][index], self.shown
        kept, report = list(record["images"]), bool(record["report"])
        if show:
            some = [one for one in kept if {str(one["modality"]), *str(one["view"]).lower().split()} & set(show)]
            told = report and "text" in show
            kept, report = (some, told) if some or told else (kept, report)
        if len(kept) > o.images:
            first = turn % len(kept)
            kept = [*kept[first:], *kept[:first]][: o.images]
        if len(kept) > 1:
            kept.sort(key=lambda one: view_order(str(one["modality"]), str(one["view"])))
        views = [str(one["view"]) for one in kept]
        if rng is not None:
            kept, report = self._present(kept, report, rng)
            views = self._told([str(one["view"]) for one in kept], [str(one["modality"]) for one in kept], rng)
        segments = [
            Segment("image", str(one["modality"]), self.joint.code_ids(codes), view)
            for one, codes, view in zip(kept, self._codes(kept, rng), views, strict=True)
        ]
        if report:
            segments.append(Segment("report", "text", self.report_ids(record)))
        return layout(segments, self.joint.vocabulary)

    @staticmethod
    def _codes(images: Sequence[Mapping[str, Any]], rng: np.random.Generator | None) -> list[np.ndarray]:
        """Codes of a study's images, all taken in one way, by chance: as they are, or as one of those stored beside."""
        ways = 1 + min((len(one.get(AUGMENTED) or ()) for one in images), default=0)
        way = 0 if rng is None or ways == 1 else int(rng.integers(ways))
        return [np.asarray(one[AUGMENTED][way - 1] if way else one["codes"]) for one in images]

    def _present(self, images: list[Any], report: bool, rng: np.random.Generator) -> tuple[list[Any], bool]:
        """Any subset of the images and the report, at least one of them."""
        drawn = rng.random(len(images) + 1) >= self.shown.absent
        if not drawn[: len(images) + report].any():
            drawn[rng.integers(len(images) + report)] = True
        return [one for one, here in zip(images, drawn, strict=False) if here], report and bool(
            drawn[-1] if images else True
        )

    def _told(self, views: list[str], modalities: list[str], rng: np.random.Generator) -> list[str]:
        """Views without some of the words that all of the images share; words that tell them apart stay."""
        if not any(views):
            return views
        known = [MODALITIES[m].words(v) for m, v in zip(modalities, views, strict=True)]
        common = sorted(set(known[0]).intersection(*known))
        untold = {
            word for word, drawn in zip(common, rng.random(len(common)), strict=True) if drawn < self.shown.untold
        }
        return [" ".join(word for word in words if word not in untold) for words in known]

    def alone(self, studies: Sequence[tuple[int, int]], rngs: Sequence[np.random.Generator], twins: bool) -> Alone:
        """One image of each study, by chance, and its report, or with `twins` another view of it, each a row by itself.

        Studies that lack either are left out.
        """
        images, others, groups = [], [], []
        for (source, index), rng in zip(studies, rngs, strict=True):
            record = self.data[source][index]
            found = list(record["images"])
            if not found or not (twins or record["report"]):
                continue
            image = found[int(rng.integers(len(found)))]
            ways = [image["codes"], *(image.get(AUGMENTED) or ())]
            if twins and len(ways) < 2:
                continue
            first, second = rng.permutation(max(2, len(ways)))[:2]
            modality = str(image["modality"])
            images.append(self._one_image(modality, ways[first % len(ways)]))
            report = Segment("report", "text", self.report_ids(record))
            others.append(self._one_image(modality, ways[second]) if twins else layout([report], self.joint.vocabulary))
            groups.append(list(MODALITIES).index(modality))
        fill = self.joint.vocabulary.eos
        if not images:  # other processes may have some, and all must run alike: a pair of no group counts nowhere
            empty = layout([Segment("report", "text", self.joint.report_ids(""))], self.joint.vocabulary)
            images, others, groups = [empty], [empty], [-1]
        return Alone(Canvas.collate(images, fill), Canvas.collate(others, fill), torch.tensor(groups))

    def _one_image(self, modality: str, codes: Any) -> Row:
        """A row of one image. Its view is not told: one who searches may not know it."""
        return layout([Segment("image", modality, self.joint.code_ids(np.asarray(codes)))], self.joint.vocabulary)

    def report_ids(self, record: Mapping[str, Any]) -> list[int]:
        """Ids of a stored report in its slot."""
        report = str(record["report"])
        return self.joint.report_ids(report, ids=[int(i) for i in record["report_ids"]] if self.fits else None)

    def seen(self) -> tuple[Slots, Views]:
        """How often each slot length and each view occurs, by modality: of the first `SAMPLE` studies a source."""
        slots: dict[str, Counter[int]] = {}
        views: dict[str, Counter[str]] = {}
        for data in self.data:
            for record in data.select(range(min(len(data), SAMPLE))):
                for one in record["images"]:
                    modality = str(one["modality"])
                    view = " ".join(MODALITIES[modality].words(str(one["view"]))) if self.joint.vocabulary.views else ""
                    views.setdefault(modality, Counter())[view] += 1
                if record["report"]:
                    length = len(self.report_ids(record))
                    for modality in {str(one["modality"]) for one in record["images"]} or {self.shown.domain} - {""}:
                        slots.setdefault(modality, Counter())[length] += 1
        return (
            {modality: dict(sorted(counter.items())) for modality, counter in slots.items()},
            {modality: dict(sorted(counter.items())) for modality, counter in views.items()},
        )


@dataclass(frozen=True)
class Stage:
    """A part of a run.

    Attributes:
        until: the first step after it.
        show: what of a study is shown; none: all (`Rows.row`).
        order: of the studies.
    """

    until: int
    show: tuple[str, ...]
    order: Order


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
        write: Callable[[Path, MeDiMModel, Slots, Views], None],
        pack: int = 0,
        stored: Source | None = None,
        validation: Validation | None = None,
        draw: Callable[[MeDiMModel, Slots], PIL.Image.Image] | None = None,
        stages: Sequence[Stage] = (),
    ) -> None:
        """`model` may be a skeleton, whose weights are in `stored`, or are drawn if that is None.

        `write` makes a model folder without weights, given the histograms of report slots and views it was trained on.
        `draw` samples a few pairs and makes a contact sheet of them.

        `pack`: positions of a row that holds several studies; 0: one study a row, padded.
        """
        self.model, self.rows, self.order, self.objective = model, rows, order, objective
        self.batch_size, self.seed, self.write, self.pack, self.stored = batch_size, seed, write, pack, stored
        self.validation, self._draw, self.stages = validation, draw, tuple(stages)

    def stage(self, step: int) -> Stage:
        """The stage of a step; after the last, all data."""
        return next((one for one in self.stages if step < one.until), Stage(step + 1, (), self.order))

    def batches(self, step: int, rank: int, world: int, parts: int) -> list[Batch]:
        """This process's share of a step in `parts`: a pure function of (seed, step)."""
        chosen = self.stage(step).order.batch(step, self.batch_size)
        mine = np.arange(self.batch_size)[share(self.batch_size, rank, world)]
        return [self._batch(step, chosen, places) for places in np.array_split(mine, parts)]

    def _batch(self, step: int, chosen: tuple[np.ndarray, np.ndarray], places: np.ndarray) -> Batch:
        first, (sources, studies) = step * self.batch_size, chosen
        picked, rows = [(int(sources[place]), int(studies[place])) for place in places], []
        for place, one in zip(map(int, places), picked, strict=True):
            rng = np.random.default_rng([self.seed, 3, step, place])
            rows.append(self.rows.row(*one, first + place, rng, self.stage(step).show))
        joint = self.rows.joint
        fill, mask_id = joint.vocabulary.eos, joint.vocabulary.mask
        canvas = Canvas.pack(rows, fill, self.pack) if self.pack else Canvas.collate(rows, fill)
        o = self.objective
        stops = joint.text.stops if o.first_sentence else ()
        batch = make_batch(canvas, places.tolist(), self.batch_size, step, self.seed, o, mask_id, stops)
        more: dict[str, Any] = {}
        for number, (name, weight) in enumerate((("align", o.align), ("invariance", o.invariance)), start=4):
            if weight:
                rngs = [np.random.default_rng([self.seed, number, step, int(place)]) for place in places]
                more[name] = self.rows.alone(picked, rngs, twins=name == "invariance")
        return replace(batch, **more)

    def count(self, batch: Batch) -> float:
        """What the loss is divided by."""
        return count(batch, self.objective)

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """The objective on one batch."""
        return loss(model, batch, self.objective)

    def save(self, folder: Path) -> None:
        """All of a model folder but the weights: config, tokenizers, histogram of report slots, sampling defaults."""
        self.write(folder, self.model, *self.seen)

    def studies(self, step: int) -> list[str]:
        """Ids of the studies of a step."""
        sources, studies = self.stage(step).order.batch(step, self.batch_size)
        return [str(self.rows.data[s][int(i)]["id"]) for s, i in zip(sources, studies, strict=True)]

    def work(self, batch: Batch) -> Work:
        """What the mathematics must do for a batch, but for the loss itself."""
        backend = self.model.attention_backend
        passes = [Work.of(batch.canvas, batch.rows, backend, batch.given)]
        for alone in (batch.align, batch.invariance):
            if alone is not None:
                passes += [Work.of(canvas, [[]] * len(KINDS), backend, None) for canvas in (alone.images, alone.others)]
        return functools.reduce(operator.add, passes)

    def draw(self, model: nn.Module) -> PIL.Image.Image | None:
        """The contact sheet of a few pairs, always of the same noise."""
        assert isinstance(model, MeDiMModel)
        return None if self._draw is None else self._draw(model, self.seen[0])

    def check_sharing(self, way: str, divides_weights: bool) -> None:
        """Refuse adapters over a model that cannot be shared so."""
        if self.model.lora is not None:
            check_sharing(self.model.lora.options, way, not divides_weights)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order of the studies follows from, beside the config."""
        return {"studies": list(self.order.sizes), "shares": list(self.order.shares)}

    @functools.cached_property
    def seen(self) -> tuple[Slots, Views]:
        """How often each slot length, and each view, occurs in training, by modality: what sampling draws from."""
        return self.rows.seen()
