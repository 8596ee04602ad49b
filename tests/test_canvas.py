"""Segments in a row, rows on a canvas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medim.canvas import ROLES, Canvas, Segment, layout
from medim.errors import UserError
from medim.vocabulary import KINDS, Vocabulary

PROMPT = Segment("prompt", "text", [3, 4])
REPORT = Segment("report", "text", [5, 6, 0])
IMAGE = Segment("image", "pathology", [12, 13, 14, 15])


def test_layout_writes_tags_around_segments(vocabulary: Vocabulary) -> None:
    tags = vocabulary.tags
    row = layout([PROMPT, IMAGE, REPORT], vocabulary)
    assert row.ids.tolist() == [
        tags["prompt"], 3, 4, tags["pathology"], tags["begin_image"], 12, 13, 14, 15, tags["end_image"],
        tags["report"], 5, 6, 0,
    ]  # fmt: skip
    assert row.segment.tolist() == [-1, 0, 0, -1, -1, 1, 1, 1, 1, -1, -1, 2, 2, 2]
    text, image = KINDS.index("text"), KINDS.index("image")
    assert row.kind.tolist() == [-1, text, text, -1, -1, image, image, image, image, -1, -1, text, text, text]
    assert row.roles == tuple(ROLES.index(name) for name in ("prompt", "image", "report"))
    for number, part in enumerate([PROMPT, IMAGE, REPORT]):  # the inverse that its docstring promises
        assert row.ids[row.segment == number].tolist() == part.ids
    assert (PROMPT.kind, IMAGE.kind) == ("text", "image")


def test_layout_refuses_an_unknown_modality(vocabulary: Vocabulary) -> None:
    with pytest.raises(UserError, match="unknown modality 'sonar'"):
        layout([Segment("image", "sonar", [12])], vocabulary)


def test_collate_pads_on_the_right(vocabulary: Vocabulary) -> None:
    rows = [layout([IMAGE, REPORT], vocabulary), layout([REPORT], vocabulary)]
    for length, wanted in ((None, 11), (5, 11), (16, 16)):
        canvas = Canvas.collate(rows, pad_id=9, length=length)
        assert canvas.ids.shape == (2, wanted) and canvas.valid.sum(1).tolist() == [11, 4]
        for i, row in enumerate(rows):
            n = len(row.ids)
            assert bool(canvas.valid[i, :n].all()) and not bool(canvas.valid[i, n:].any())
            assert canvas.ids[i, :n].tolist() == row.ids.tolist() and bool((canvas.ids[i, n:] == 9).all())
            assert bool((canvas.segment[i, n:] == -1).all()) and bool((canvas.kind[i, n:] == -1).all())
    assert canvas.role.tolist() == [[ROLES.index("image"), ROLES.index("report")], [ROLES.index("report"), -1]]


def test_has_role_finds_segments_wherever_they_stand(vocabulary: Vocabulary) -> None:
    parts = [[IMAGE, REPORT], [REPORT], [REPORT, IMAGE], [PROMPT, IMAGE, IMAGE]]
    canvas = Canvas.collate([layout(segments, vocabulary) for segments in parts], 0)
    for names in (("report",), ("image",), ("report", "image"), ("prompt",)):
        found = canvas.has_role(*names)
        for i, segments in enumerate(parts):
            ids = [one for part in segments if part.role in names for one in part.ids]
            assert canvas.ids[i][found[i]].tolist() == ids
        assert not bool((found & (canvas.segment < 0)).any())


def test_with_ids_and_to_keep_the_layout(vocabulary: Vocabulary) -> None:
    canvas = Canvas.collate([layout([IMAGE, REPORT], vocabulary)], 0)
    other = canvas.with_ids(torch.zeros_like(canvas.ids)).to("cpu")
    assert not bool(other.ids.any()) and torch.equal(other.kind, canvas.kind)
    assert other.role.dtype == canvas.ids.dtype == torch.int64
    assert layout([IMAGE], vocabulary).ids.dtype == np.int64


def test_place_numbers_the_codes_of_each_image_from_one(vocabulary: Vocabulary) -> None:
    first = vocabulary.image[0]
    images = [Segment("image", "xray", [first, first + 1, first + 2]), Segment("image", "ct", [first + 3, first])]
    canvas = Canvas.collate([layout([*images, Segment("report", "text", [4, 5])], vocabulary)], pad_id=0, length=16)
    assert canvas.place[0].tolist() == [0, 0, 1, 2, 3, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0]
