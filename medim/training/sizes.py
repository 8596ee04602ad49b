"""What the batches of a run look like before its data are at hand: lengths, rows, masked positions.

Shape letters: L canvas length, S segments a row, K codebook size.
"""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from medim.config import options
from medim.diffusion import Schedule
from medim.model.flops import Work
from medim.objective import GIVEN, ObjectiveOptions, Task
from medim.vocabulary import KINDS

Masking = Literal["none", "keys", "pairs"]
TAGS = 3  # of an image: modality, begin, end; each word of its view that is told adds one


@options
class EstimateOptions:
    """What `medim estimate` must be told where the tokenizers and data that a config names are not at hand.

    Attributes:
        text_tokens: ids of the text tokenizer.
        codes: of the image tokenizer, K.
        image_codes: of one image.
        report: positions of a report's slot in the mean; 0: all are as long as the longest.
        gpus, zero, gpu: for how many cards of which kind, and which ZeRO stage, the config is meant.
    """

    text_tokens: Annotated[int, Field(ge=0)] = 0
    codes: Annotated[int, Field(ge=0)] = 0
    image_codes: Annotated[int, Field(ge=0)] = 0
    report: Annotated[int, Field(ge=0)] = 0
    gpus: Annotated[int, Field(ge=1)] = 1
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    gpu: str = "H100"


@dataclass(frozen=True)
class Sizes:
    """Of the studies and canvases of a run. All studies have as many images as fit on a canvas, and a report.

    Attributes:
        images, image_codes: of a study, and codes of an image.
        report, longest: positions of a report's slot, of a mean one and of the longest.
        pack: positions of a row that several studies share; 0: one study a row.
    """

    images: int
    image_codes: int
    report: int
    longest: int
    pack: int
    objective: ObjectiveOptions

    def study(self, report: int) -> int:
        """Positions of a study whose report has a slot of so many."""
        return self.images * (self.image_codes + TAGS) + 1 + report

    @property
    def length(self) -> int:
        """L, of the longest row."""
        return self.pack or self.study(self.longest)

    @property
    def together(self) -> int:
        """Studies in a row."""
        return max(1, self.pack // self.study(self.report))

    @property
    def levels(self) -> int:
        """Noise levels of a row: one a segment, and that of tags and padding."""
        return self.together * (self.images + 1) + 1

    @property
    def masking(self) -> Masking:
        """What attention needs of a mask: none, of keys (padding), or of pairs."""
        if self.pack or self.objective.condition_attention == "prefix":
            return "pairs"
        return "none" if self.report == self.longest else "keys"

    def rows(self, studies: int) -> int:
        """Rows of a batch of so many studies."""
        return -(-studies // self.together)

    def masked(self, kind: str) -> float:
        """Share of the positions of a kind that a step learns from, in the mean."""
        o = self.objective
        t = torch.linspace(o.min_t, 1.0, 10_001, dtype=torch.float64)
        rate = 1 - Schedule(o.schedule, o.schedule_power).alpha(t)
        role = "image" if kind == "image" else "report"
        learnt = sum(odds * (1 - self._given(task, role)) for task, odds in o.tasks.items()) / sum(o.tasks.values())
        return learnt * float(torch.trapezoid(rate, t)) / (1 - o.min_t)

    def _given(self, task: Task, role: str) -> float:
        """The share of a study's images, or of its report, that a task is given."""
        if task == "translate" and role == "image":
            return 1 - 1 / self.images
        return float(role in GIVEN[task])

    def scored(self, studies: int) -> tuple[int, ...]:
        """Supervised rows of so many studies, by kind, in the mean."""
        positions = {"text": self.report, "image": self.images * self.image_codes}
        return tuple(round(studies * positions[kind] * self.masked(kind)) for kind in KINDS)

    def _attended(self) -> float:
        """Pairs of a mean study that attend to each other."""
        size, codes = self.study(self.report), self.images * self.image_codes
        if self.objective.condition_attention == "full":
            return float(size**2)
        tags, tasks = size - codes - self.report, self.objective.tasks
        total = 0.0
        for task, odds in tasks.items():
            given = tags + codes * self._given(task, "image") + self.report * self._given(task, "report")
            total += odds * (size**2 - given * (size - given))
        return total / sum(tasks.values())

    @property
    def alone(self) -> list[tuple[int, int]]:
        """Of the segments that a study's alignment and invariance run alone: positions in the mean, and padded."""
        image, o = (self.image_codes + TAGS,) * 2, self.objective
        return [image, (1 + self.report, 1 + self.longest)] * bool(o.align) + [image, image] * bool(o.invariance)

    @staticmethod
    def _alone(size: int, length: int, backend: str) -> Work:
        """The work of a row of one segment."""
        attended, levels = size**2, 2  # its own level, and that of tags
        pairs = attended if backend in ("flash_attention_2", "flex_attention") else length**2
        return Work(size, length, attended, pairs, levels, levels * length, (0,) * len(KINDS))

    def work(self, studies: int, backend: str) -> Work:
        """The work of so many studies in the mean; `backend` as in `Work.of`."""
        alone = [self._alone(*one, backend).times(studies) for one in self.alone]
        return functools.reduce(operator.add, alone, self._together(studies, backend))

    def _together(self, studies: int, backend: str) -> Work:
        """That of their canvases."""
        rows = self.rows(studies)
        attended = round(studies * self._attended())
        skips = backend in ("flash_attention_2", "flex_attention")
        return Work(
            valid=studies * self.study(self.report),
            positions=rows * self.length,
            attended=attended,
            pairs=attended if skips else rows * self.length**2,
            levels=rows * self.levels,
            spread=rows * self.levels * self.length,
            rows=self.scored(studies),
        )


def slots(longest: int, multiple: int, report: int) -> int:
    """A mean slot as slots are cut: up to a multiple, at most the longest."""
    return min(longest, math.ceil(report / multiple) * multiple) if report else longest
