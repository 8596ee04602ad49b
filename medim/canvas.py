"""Segments laid out in a row, rows padded or packed to a canvas.

Shape letters: B batch, L canvas length, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from medim.errors import UserError
from medim.vocabulary import KINDS, Kind, Vocabulary

ROLES = ("prompt", "report", "image")  # the index of a role is what `Canvas.role` stores
Fill = Literal["full", "padded", "packed"]


@dataclass(frozen=True)
class Segment:
    """A run of positions of one modality: ids of the joint vocabulary, without tags.

    Attributes:
        view: of an image, as `medim.data.studies.Image.view`; what of it the vocabulary knows becomes tags.
    """

    role: str
    modality: str
    ids: Sequence[int]
    view: str = ""

    @property
    def kind(self) -> Kind:
        """Which columns of the vocabulary its positions can hold."""
        return "image" if self.role == "image" else "text"


@dataclass(frozen=True)
class Row:
    """One study as a row of L positions, before padding.

    Attributes:
        ids, segment, kind: int64 [L]; segment and kind (an index into KINDS) are -1 at tags.
        roles: [S], indices into ROLES.
        modalities, views: [S].
        tags: [S], of an image the numbers of its modality's and views' tags, from 1 (`Vocabulary.numbers`).
        aligned: int64 [L], positions by which the codes of all images at one place agree.
    """

    ids: np.ndarray
    segment: np.ndarray
    kind: np.ndarray
    roles: tuple[int, ...]
    modalities: tuple[str, ...]
    views: tuple[str, ...]
    tags: tuple[tuple[int, ...], ...]
    aligned: np.ndarray


def layout(segments: Sequence[Segment], vocabulary: Vocabulary) -> Row:
    """Put segments in a row: ``<modality> <begin image> codes <end image>`` and ``<report> text`` (`Vocabulary.frame`).

    The inverse reads `Row.segment`: positions of segment s hold exactly its ids.
    """
    frames = [vocabulary.frame(part.role, part.modality, part.view) for part in segments]
    lead = max((len(f[0]) for f, part in zip(frames, segments, strict=True) if part.role == "image"), default=0)
    ids: list[int] = []
    segment: list[int] = []
    kind: list[int] = []
    aligned: list[int] = []
    place, shared = 0, None  # where the next text goes, and where all images begin

    for number, (part, (before, after)) in enumerate(zip(segments, frames, strict=True)):
        ids += [*before, *part.ids, *after]
        segment += [-1] * len(before) + [number] * len(part.ids) + [-1] * len(after)
        kind += [-1] * len(before) + [KINDS.index(part.kind)] * len(part.ids) + [-1] * len(after)
        start = place
        if part.role == "image":
            shared = place + lead if shared is None else shared
            start = shared - len(before)
        end = start + len(before) + len(part.ids) + len(after)
        aligned += range(start, end)
        place = max(place, end)
    tags = tuple(vocabulary.numbers(one.modality, one.view) if one.role == "image" else () for one in segments)
    return Row(
        np.asarray(ids),
        np.asarray(segment),
        np.asarray(kind),
        tuple(ROLES.index(part.role) for part in segments),
        tuple(part.modality for part in segments),
        tuple(part.view for part in segments),
        tags,
        np.asarray(aligned),
    )


@dataclass(frozen=True)
class Canvas:
    """A batch of rows, padded on the right, or packed: several studies in one row that do not see each other.

    Attributes:
        ids: joint-vocabulary ids.
        segment: number of the segment within its row, -1 at tags and padding.
        kind: index into `medim.vocabulary.KINDS`, -1 at tags and padding.
        study: number of the study among all those of the canvas, -1 at padding, which no study attends to.
        role: index into `ROLES` of each segment, -1 where a row has fewer.
        aligned: positions within the study by which codes of all its images at one place agree (`Row.aligned`).
        tags: numbers of the tags of each image segment, from 1 on; 0 fills.
        fill: whether all rows hold one study and no padding (``full``), padding too (``padded``), or several studies
            (``packed``): known beforehand, so that no mask is made, and no device asked, where none is needed.
    """

    ids: Int[Tensor, "B L"]
    segment: Int[Tensor, "B L"]
    kind: Int[Tensor, "B L"]
    study: Int[Tensor, "B L"]
    role: Int[Tensor, "B S"]
    aligned: Int[Tensor, "B L"]
    tags: Int[Tensor, "B S A"]
    fill: Fill = "padded"

    @classmethod
    def collate(cls, rows: Sequence[Row], pad_id: int, length: int | None = None) -> Canvas:
        """One study a row, padded to the longest one, or to `length`; padding holds `pad_id`."""
        longest = max(len(row.ids) for row in rows)
        length = max(longest, length or 0)
        fill: Fill = "full" if all(len(row.ids) == length for row in rows) else "padded"
        return cls._fill([[number] for number in range(len(rows))], rows, pad_id, length, fill)

    @classmethod
    def pack(cls, rows: Sequence[Row], pad_id: int, length: int) -> Canvas:
        """As many studies a row as fit in `length` positions: first fit, the longest study first.

        Raises:
            UserError: a study is longer than `length`.
        """
        longest = max(len(row.ids) for row in rows)
        if longest > length:
            raise UserError(f"a study of {longest} positions does not fit in packed rows of {length}: pack longer rows")
        bins: list[list[int]] = []
        room: list[int] = []
        for number in sorted(range(len(rows)), key=lambda n: -len(rows[n].ids)):
            size = len(rows[number].ids)
            at = next((i for i, left in enumerate(room) if left >= size), len(room))
            if at == len(room):
                bins.append([])
                room.append(length)
            bins[at].append(number)
            room[at] -= size
        return cls._fill(bins, rows, pad_id, length, "packed")

    @classmethod
    def _fill(cls, bins: Sequence[Sequence[int]], rows: Sequence[Row], pad_id: int, length: int, fill: Fill) -> Canvas:
        """Row b of the canvas holds the studies `bins[b]` of `rows`, one after the other."""
        shape = (len(bins), length)
        ids, segment, kind, study, aligned = (np.full(shape, value) for value in (pad_id, -1, -1, -1, 0))
        role = np.full((len(bins), max(sum(len(rows[n].roles) for n in numbers) for numbers in bins)), -1)
        tags = np.zeros((*role.shape, max((len(t) for row in rows for t in row.tags), default=0)), dtype=np.int64)
        for b, numbers in enumerate(bins):
            start = segments = 0
            for number in numbers:
                row = rows[number]
                at = slice(start, start := start + len(row.ids))
                ids[b, at], kind[b, at], study[b, at] = row.ids, row.kind, number
                segment[b, at] = np.where(row.segment < 0, -1, row.segment + segments)
                role[b, segments : segments + len(row.roles)] = row.roles
                aligned[b, at] = row.aligned
                for s, numbers_of in enumerate(row.tags, segments):
                    tags[b, s, : len(numbers_of)] = numbers_of
                segments += len(row.roles)
        made = torch.from_numpy
        return cls(made(ids), made(segment), made(kind), made(study), made(role), made(aligned), made(tags), fill)

    @property
    def valid(self) -> Bool[Tensor, "B L"]:
        """False at padding."""
        return self.study >= 0

    @property
    def position(self) -> Int[Tensor, "B L"]:
        """Of each position, its number within its study, from 0."""
        return self._since(self.study)

    @property
    def place(self) -> Int[Tensor, "B L"]:
        """Of a code, its number within its image, from 1; 0 at text, tags and padding."""
        return torch.where(self.kind == KINDS.index("image"), self._since(self.segment) + 1, 0)

    @staticmethod
    def _since(runs: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """How many positions a run of equal numbers has gone on."""
        here = torch.arange(runs.shape[1], device=runs.device).expand_as(runs)
        before = torch.nn.functional.pad(runs, (1, 0), value=-2)[:, :-1]
        return here - torch.where(runs != before, here, 0).cummax(dim=1).values

    def has_role(self, *names: str) -> Bool[Tensor, "B L"]:
        """True at the positions of segments with one of these roles."""
        wanted = torch.tensor([ROLES.index(name) for name in names], device=self.role.device)
        return self._spread(torch.isin(self.role, wanted))

    def outside(self, generate: Bool[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Positions of segments in which nothing is generated, and tags: what is given, or unknown, throughout."""
        here = (generate & (self.segment >= 0)).long()
        touched = torch.zeros_like(self.role).scatter_add(1, self.segment.clamp(min=0), here) > 0
        return self.valid & ~self._spread(touched)

    def _spread(self, by_segment: Bool[Tensor, "B S"]) -> Bool[Tensor, "B L"]:
        return by_segment.gather(1, self.segment.clamp(min=0)) & (self.segment >= 0)

    def with_ids(self, ids: Int[Tensor, "B L"]) -> Canvas:
        """The same layout with other ids."""
        return replace(self, ids=ids)

    def to(self, device: torch.device | str) -> Canvas:
        """The same canvas on another device."""
        return self._each(lambda values: values.to(device, non_blocking=True))

    def repeat(self, copies: int) -> Canvas:
        """The same rows `copies` times."""
        return self._each(lambda values: values.repeat(copies, *[1] * (values.dim() - 1)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Canvas:
        return Canvas(
            change(self.ids),
            change(self.segment),
            change(self.kind),
            change(self.study),
            change(self.role),
            change(self.aligned),
            change(self.tags),
            self.fill,
        )
