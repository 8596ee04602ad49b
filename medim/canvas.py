"""Segments laid out in a row, rows padded to a canvas.

Shape letters: B batch, L canvas length, S segments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from medim.vocabulary import KINDS, Kind, Vocabulary

ROLES = ("prompt", "report", "image")  # the index of a role is what `Canvas.role` stores


@dataclass(frozen=True)
class Segment:
    """A run of positions of one modality: ids of the joint vocabulary, without tags."""

    role: str
    modality: str
    ids: Sequence[int]

    @property
    def kind(self) -> Kind:
        """Which columns of the vocabulary its positions can hold."""
        return "image" if self.role == "image" else "text"


@dataclass(frozen=True)
class Row:
    """One study as a row of L positions, before padding."""

    ids: np.ndarray  # int64 [L]
    segment: np.ndarray  # int64 [L], -1 at tags
    kind: np.ndarray  # int64 [L], index into KINDS, -1 at tags
    roles: tuple[int, ...]  # [S], index into ROLES


def layout(segments: Sequence[Segment], vocabulary: Vocabulary) -> Row:
    """Put segments in a row: ``<modality> <begin image> codes <end image>`` and ``<report> text``.

    The inverse reads `Row.segment`: positions of segment s hold exactly its ids.
    """
    ids: list[int] = []
    segment: list[int] = []
    kind: list[int] = []

    def put(values: Sequence[int], s: int = -1, k: int = -1) -> None:
        ids.extend(values)
        segment.extend([s] * len(values))
        kind.extend([k] * len(values))

    tags = vocabulary.tags
    for number, part in enumerate(segments):
        if part.role == "image":
            put([vocabulary.modality_tag(part.modality), tags["begin_image"]])
            put(part.ids, number, KINDS.index("image"))
            put([tags["end_image"]])
        else:
            put([tags[part.role]])
            put(part.ids, number, KINDS.index("text"))
    roles = tuple(ROLES.index(part.role) for part in segments)
    return Row(np.asarray(ids), np.asarray(segment), np.asarray(kind), roles)


@dataclass(frozen=True)
class Canvas:
    """A batch of rows, padded on the right.

    Attributes:
        ids: joint-vocabulary ids.
        segment: segment number, -1 at tags and padding.
        kind: index into `medim.vocabulary.KINDS`, -1 at tags and padding.
        valid: False at padding, which no position attends to.
        role: index into `ROLES` of each segment, -1 where a row has fewer.
    """

    ids: Int[Tensor, "B L"]
    segment: Int[Tensor, "B L"]
    kind: Int[Tensor, "B L"]
    valid: Bool[Tensor, "B L"]
    role: Int[Tensor, "B S"]

    @classmethod
    def collate(cls, rows: Sequence[Row], pad_id: int, length: int | None = None) -> Canvas:
        """Pad rows to the longest one, or to `length`; padding holds `pad_id` and is not valid."""
        longest = max(len(row.ids) for row in rows)
        shape = (len(rows), max(longest, length or 0))
        ids, segment, kind = np.full(shape, pad_id), np.full(shape, -1), np.full(shape, -1)
        valid = np.zeros(shape, dtype=bool)
        role = np.full((len(rows), max(len(row.roles) for row in rows)), -1)
        for i, row in enumerate(rows):
            n = len(row.ids)
            ids[i, :n], segment[i, :n], kind[i, :n], valid[i, :n] = row.ids, row.segment, row.kind, True
            role[i, : len(row.roles)] = row.roles
        return cls(*(torch.from_numpy(array) for array in (ids, segment, kind, valid, role)))

    @property
    def place(self) -> Int[Tensor, "B L"]:
        """Of a code, its number within its image, from 1; 0 at text, tags and padding."""
        here = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        before = torch.nn.functional.pad(self.segment, (1, 0), value=-1)[:, :-1]
        first = torch.where(self.segment != before, here, 0).cummax(dim=1).values
        return torch.where(self.kind == KINDS.index("image"), here - first + 1, 0)

    def has_role(self, *names: str) -> Bool[Tensor, "B L"]:
        """True at the positions of segments with one of these roles."""
        wanted = torch.tensor([ROLES.index(name) for name in names], device=self.role.device)
        by_segment = torch.isin(self.role, wanted)
        return by_segment.gather(1, self.segment.clamp(min=0)) & (self.segment >= 0)

    def with_ids(self, ids: Int[Tensor, "B L"]) -> Canvas:
        """The same layout with other ids."""
        return replace(self, ids=ids)

    def to(self, device: torch.device | str) -> Canvas:
        """The same canvas on another device."""
        moved = (v.to(device, non_blocking=True) for v in (self.ids, self.segment, self.kind, self.valid, self.role))
        return Canvas(*moved)
