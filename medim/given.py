"""What is given of a sample, and what is to be made: any positions of any segment.

A task says which parts of a request count and what they leave to be generated; from there on it is a row of positions,
of which some are generated, and no more (`Draft`).
Shape letters: L positions of a row, h w code grid, R side in pixels of a prepared picture, H W pixels of the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import PIL.Image
import PIL.ImageOps
from jaxtyping import Bool, Int

from medim.canvas import Row, Segment, layout
from medim.data.studies import Image
from medim.errors import UserError
from medim.pictures import read_picture
from medim.pictures.files import open_file
from medim.template import FREE, GAP, Gap, Slot, Template, Words
from medim.tokenization.image import Fit, padded
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import MODALITIES, Vocabulary, view_order

Task = Literal["pair", "report", "image", "translate", "infill", "inpaint", "edit"]
Side = Literal["top", "bottom", "left", "right"]
SIDES: tuple[Side, ...] = get_args(Side)
Slots = dict[str, dict[int, int]]  # how often each slot length occurred in training, by domain
Views = dict[str, dict[str, int]]  # and each view of an image; an empty one where views were not told


@dataclass(frozen=True)
class Request:
    """One sample to make: what is given and its own random stream.

    Attributes:
        domain: the modality of the image that is given, or made.
        view: of that image, such as ``"t2 axial"``; empty: not told if the image is given, else drawn as in training.
        sources: translate: the given images, each with its modality and its view.
        image: a picture or its file. `report`: a text; for task infill with gaps (`medim.template.Template.parse`).
        mask: inpaint: a picture as large as `image`; what is not black is regenerated. Or:
        box: inpaint: (x0, y0, x1, y1) in pixels of `image`, the last two excluded.
        keep_image: edit: the half that is kept.
        keep_report: edit: the words that begin the report, or how many words of `report` are kept.
        gap: infill: fewest and most tokens of a gap without bounds of its own.
        paste_back: put the given pixels back where no pixel was to be regenerated.
        where: begins the line that tells of a mistake in this request, such as ``"studies.jsonl:3: "``.
    """

    id: str
    domain: str
    stream: tuple[int, ...]
    image: PIL.Image.Image | Path | None = None
    report: str | None = None
    mask: PIL.Image.Image | Path | None = None
    box: tuple[int, int, int, int] | None = None
    keep_image: str | None = None
    keep_report: str | int | None = None
    gap: tuple[int, int] = GAP
    paste_back: bool = False
    view: str = ""
    sources: tuple[Image, ...] = ()
    where: str = ""


@dataclass(frozen=True)
class Draft:
    """A row to fill.

    Attributes:
        image, report: numbers of these segments in the row; -1 where there is none.
        generate: bool [L], True where ids are generated. Elsewhere ids are given, or [MASK]: unknown.
        rule: int [L], row of `Words.forbidden` of each position.
        slot: the report's part of the row; None if the report is unknown.
        prior: -log of the share of reports in training whose slot was as long, in nats.
    """

    row: Row
    image: int
    report: int
    generate: np.ndarray
    rule: np.ndarray
    slot: Slot | None
    prior: float


Score = Callable[[Sequence[Draft]], list[float]]  # -log p(what is given | layout) of rows that differ in gap lengths


@dataclass(frozen=True)
class Given:
    """A request as positions.

    Attributes:
        codes: int [h, w], codes of the given image, -1 where none is.
        regenerate: bool [h, w], codes to make.
        pixels: bool [R, R], pixels to make.
        picture: the given image as the model saw it. `sources`: those of a translation, with their names.
        view: what is told of the image.
        tried: combinations of gap lengths that were compared.
        spent: forward passes that this took. `seconds`: wall time of all the reading.
    """

    request: Request
    codes: Int[np.ndarray, "h w"]
    regenerate: Bool[np.ndarray, "h w"]
    pixels: Bool[np.ndarray, "R R"]
    picture: PIL.Image.Image | None
    draft: Draft
    template: Template | None
    view: str = ""
    sources: tuple[tuple[str, PIL.Image.Image], ...] = ()
    tried: int = 1
    spent: int = 0
    seconds: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        """What is made and what is known; requests that agree in it can be batched without changing each other."""
        known = bool((self.codes >= 0).any()), self.template is not None and self.template.known, len(self.sources)
        made = bool(self.regenerate.any()), self.template is not None and bool(self.template.gaps)
        return (*known, *made)


# ------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Geometry:
    """Where `prepare_image` puts the pixels of a file: `side` is R, `fit` crop or pad."""

    side: int
    fit: Fit = "crop"

    def edges(self, length: int, other: int, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Along a side of the file of `length` pixels, beside one of `other`: the first pixel that each of n equal
        parts of the prepared side holds a part of, and the first after them; two equal ones if it holds border only.

        A part k of n begins at pixel R k / n of the prepared picture, and pixel x of that is (x - offset) length / size
        of the file: exact in whole numbers.
        """
        starts = self.side * np.arange(n + 1)  # in units of 1 / n pixel of the prepared picture
        if self.fit == "crop":
            short = min(length, other)
            ends, unit = (length - short) * self.side * n + 2 * short * starts, 2 * self.side * n
        else:
            size, offset = padded(length, max(length, other), self.side)
            ends, unit = (starts - offset * n) * length, size * n
        first, after = ends[:-1] // unit, -(-ends[1:] // unit)
        return np.clip(first, 0, length), np.clip(after, 0, length)

    def touched(self, marked: Bool[np.ndarray, "H W"], n: int) -> Bool[np.ndarray, "n n"]:
        """Which of n x n equal cells of the prepared picture hold a marked pixel, or a part of one.

        n = R gives the pixels of the prepared picture, n = R / f the codes.
        """
        total = np.pad(marked.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
        height, width = marked.shape
        (top, bottom), (left, right) = self.edges(height, width, n), self.edges(width, height, n)
        inside = total[bottom][:, right] - total[bottom][:, left] - total[top][:, right] + total[top][:, left]
        return inside > 0


def _open_mask(mask: PIL.Image.Image | Path) -> PIL.Image.Image:
    """A mask as it is shown, its EXIF orientation applied; its values as they are."""
    if isinstance(mask, Path) and not mask.is_file():
        raise UserError(f"mask {mask}: no such file")
    return PIL.ImageOps.exif_transpose(open_file(mask) if isinstance(mask, Path) else mask)


def marked_pixels(request: Request) -> Bool[np.ndarray, "H W"]:
    """The pixels of the given image that a mask or a box marks.

    A pixel of a mask is marked unless it is black or transparent.

    Raises:
        UserError: a mask that cannot be read or has another size, a box that is no box within the image.
    """
    assert request.image is not None
    if isinstance(request.image, Path) and not request.image.is_file():
        raise UserError(f"image {request.image}: no such file")
    width, height = read_picture(request.image).image.size
    if request.mask is not None:
        mask = _open_mask(request.mask)
        name = f"mask {request.mask}" if isinstance(request.mask, Path) else "the mask"
        if mask.size != (width, height):
            raise UserError(
                f"{name} has {mask.width}x{mask.height} pixels, the image {width}x{height}: "
                "give a mask of the image's own size"
            )
        if mask.mode.startswith(("I", "F")):
            return np.asarray(mask) != 0
        values = np.asarray(mask.convert("RGBA"))
        return values[..., :3].any(-1) & (values[..., 3] > 0)
    assert request.box is not None
    x0, y0, x1, y1 = request.box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise UserError(
            f"box {x0},{y0},{x1},{y1}: not within the image of {width}x{height} pixels; "
            f"give x0,y0,x1,y1 with 0 <= x0 < x1 <= {width} and 0 <= y0 < y1 <= {height}"
        )
    marked = np.zeros((height, width), dtype=bool)
    marked[y0:y1, x0:x1] = True
    return marked


Region = tuple[Bool[np.ndarray, "h w"], Bool[np.ndarray, "R R"]]  # of codes, of pixels


def _everywhere(request: Request, place: Geometry, grid: int) -> Region:
    return np.ones((grid, grid), bool), np.ones((place.side, place.side), bool)


def _nowhere(request: Request, place: Geometry, grid: int) -> Region:
    return np.zeros((grid, grid), bool), np.zeros((place.side, place.side), bool)


def _marked(request: Request, place: Geometry, grid: int) -> Region:
    marked = marked_pixels(request)
    codes = place.touched(marked, grid)
    if not marked.any():
        raise UserError("the mask marks no pixel: nothing to regenerate (white is regenerated, black is kept)")
    if not codes.any():
        raise UserError("what is marked lies outside the centre square, which is all that the model sees")
    if (codes == place.touched(np.ones_like(marked), grid)).all():
        raise UserError("all of the image is marked, nothing of it would be kept: use task image, or pair")
    return codes, place.touched(marked, place.side)


def _half(request: Request, place: Geometry, grid: int) -> Region:
    if request.keep_image is None:
        return _everywhere(request, place, grid)
    codes = np.ones((grid, grid), bool)
    kept = -(-grid // 2)
    first, rest, all_ = slice(kept), slice(grid - kept, None), slice(None)
    where = {"top": (first, all_), "bottom": (rest, all_), "left": (all_, first), "right": (all_, rest)}
    codes[where[request.keep_image]] = False
    return codes, np.kron(codes, np.ones((place.side // grid, place.side // grid), bool))


# -------------------------------------------------------------------------------------------------------- reports


def _written(request: Request) -> Template | None:
    return Template.open()


def _whole(request: Request) -> Template | None:
    return Template((request.report,)) if request.report else None


def _gaps(request: Request) -> Template | None:
    assert request.report is not None
    return Template.parse(request.report, request.gap)


def _prefix(request: Request) -> Template | None:
    return Template.open(kept_words(request))


def kept_words(request: Request) -> str:
    """The words that `keep_report` keeps: a text, or a number of words of `report`.

    Raises:
        UserError: a number without a report or beyond its words; a text that does not begin the given report.
    """
    keep, report = request.keep_report, request.report
    if keep is None:
        return ""
    if isinstance(keep, int) or keep.strip().isdigit():
        n, words = int(keep), list(re.finditer(r"\S+", report or ""))
        if report is None:
            raise UserError(f"keep_report {n}: a number of words needs the report whose words they are")
        if not 1 <= n <= len(words):
            raise UserError(f"keep_report {n}: the report has {len(words)} words")
        return report[: words[n - 1].end()]
    if not keep.strip():
        raise UserError("keep_report is empty: give the words that are kept, or their number")
    if report is not None and not report.startswith(keep):
        raise UserError(f"keep_report {keep[:40]!r}: the given report does not begin with it")
    return keep


# ---------------------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class TaskRule:
    """What a task takes, and what it leaves to be generated.

    Attributes:
        needs: fields of a request that must be given; where several stand together, at least one of them.
        takes: fields that may be given.
        region: what of the image is made. `template`: what of the report; None: it is unknown.
    """

    needs: tuple[tuple[str, ...], ...]
    takes: tuple[str, ...]
    region: Callable[[Request, Geometry, int], Region]
    template: Callable[[Request], Template | None]


TASKS: dict[Task, TaskRule] = {
    "pair": TaskRule((), (), _everywhere, _written),
    "report": TaskRule((("image",),), (), _nowhere, _written),
    "image": TaskRule((("report",),), (), _everywhere, _whole),
    "translate": TaskRule((("sources",),), ("report",), _everywhere, _whole),
    "infill": TaskRule((("report",),), ("image",), _nowhere, _gaps),
    "inpaint": TaskRule((("image",), ("mask", "box")), ("report", "paste_back"), _marked, _whole),
    "edit": TaskRule((("keep_image", "keep_report"),), ("image", "report", "paste_back"), _half, _prefix),
}
FIELDS = ("image", "sources", "report", "mask", "box", "keep_image", "keep_report", "paste_back")


def takes(task: Task) -> tuple[str, ...]:
    """The fields of a request that a task looks at."""
    rule = TASKS[task]
    return tuple(name for name in FIELDS if name in rule.takes or any(name in group for group in rule.needs))


def check(task: Task, request: Request) -> None:
    """Check which fields are given.

    Raises:
        UserError: one is missing, superfluous, or has no such value.
    """
    present = {name: value for name in FIELDS if (value := getattr(request, name)) not in (None, "", False, ())}
    for group in TASKS[task].needs:
        if not any(name in present for name in group):
            raise UserError(f"task {task} needs {' or '.join(_spoken(name) for name in group)} to start from")
    for name in FIELDS:
        if getattr(request, name) not in (None, False, ()) and name not in takes(task):
            if task == "translate" and name == "image":
                raise UserError("task translate takes `sources`: images with their modality and view")
            if name in ("image", "report"):
                raise UserError(f"task {task} makes the {name} itself: leave the given {name} out")
            raise UserError(f"task {task} takes no {name}: leave it out")
    if request.mask is not None and request.box is not None:
        raise UserError("give a mask or a box, not both")
    if request.keep_image is not None and request.keep_image not in SIDES:
        raise UserError(f"keep_image {request.keep_image!r}: one of {', '.join(SIDES)}")
    if task == "edit":
        if ("image" in present) != ("keep_image" in present):
            raise UserError(
                "task edit: an image needs keep_image, which says the half to keep, and keep_image an image"
            )
        if "report" in present and "keep_report" not in present:
            raise UserError("task edit: say with keep_report how many words of the report are kept, or which")
    for image in (request.image, *(one.pixels for one in request.sources)):
        if isinstance(image, Path) and not image.is_file():
            raise UserError(f"image {image}: no such file")


def _check_sources(request: Request) -> None:
    """Each image of a translation must be told apart from the others by its modality and the words of its view."""
    named = [(one.modality, one.view) for one in request.sources] + [(request.domain, request.view)]
    words = [frozenset((m, *MODALITIES[m].words(v))) for m, v in named if m in MODALITIES]
    for number, one in enumerate(words):
        for other in range(number):
            if one == words[other]:
                name = name_of(*named[number])
                which = "source and target are both" if number == len(words) - 1 else "two sources are both"
                raise UserError(f"{which} {name}: say what tells them apart, such as t1 and t2, or mri and ct")


def name_of(modality: str, view: str) -> str:
    """An image as it is spoken of."""
    return f"{modality} {view}".strip()


def read_name(text: str, domain: str) -> tuple[str, str]:
    """What a user calls an image, as modality and view: ``"gm"``, ``"ct soft"``, ``"lateral"``.

    Example:
        >>> read_name("gm axial", "mri"), read_name("CT soft", "mri"), read_name("mri", "ct")
        (('mri', 'gm axial'), ('ct', 'soft'), ('mri', ''))
    """
    words = text.lower().split()
    modality = next((word for word in words if word in MODALITIES), domain)
    return modality, " ".join(word for word in words if word not in MODALITIES)


def read_source(text: str, domain: str, folder: Path | None = None) -> Image:
    """A given image as ``NAME=FILE``, or a file whose own name tells what it is (``T1.png``, ``head_t2_axial.png``).

    Args:
        folder: what the file is relative to, if it is there.
    """
    name, equals, file = text.partition("=")
    known = set(MODALITIES) | {word for one in MODALITIES.values() for words in one.views.values() for word in words}
    if not equals or not set(name.lower().split()) <= known:
        file, said = text, re.split(r"[^a-z0-9]+", Path(text).stem.lower())
        modality = next((word for word in said if word in MODALITIES), domain)
        name = f"{modality} {' '.join(MODALITIES[modality].words(' '.join(said)))}" if modality in MODALITIES else ""
    path = folder / file if folder is not None and (folder / file).exists() else Path(file)
    modality, view = read_name(name, domain)
    return Image(modality, path, view)


def completed(view: str, modality: str, others: Sequence[Image], more: str = "") -> str:
    """A view with what it does not say itself taken from `more`, or else from the other images: sequence, plane, ..."""
    said = [*MODALITIES[modality].words(view)] if modality in MODALITIES else []
    extra = [word for word in view.lower().split() if word not in said]
    for words in MODALITIES[modality].views.values() if modality in MODALITIES else ():
        if not set(words) & set(said):
            told = (*more.lower().split(), *(word for one in others for word in one.view.lower().split()))
            said += [next((word for word in told if word in words), "")]
    return " ".join(word for word in (*said, *extra) if word)


def check_view(modality: str, view: str, vocabulary: Vocabulary, seen: Mapping[str, int] | None) -> None:
    """Check the words of a view that a user told.

    Args:
        seen: the views that the model was trained on, if that is known.

    Raises:
        UserError: a word that the modality or the model does not have, or two words for one thing.
    """
    tables = MODALITIES[modality].views
    for word in view.lower().split():
        if not any(word in words for words in tables.values()):
            known = "; ".join(f"{name}: {', '.join(words)}" for name, words in tables.items()) or "no views"
            raise UserError(f"unknown view {word!r} of {modality}: it has {known}")
        trained = sorted({one for told in seen or () for one in told.split()})
        if word not in vocabulary.views or (seen and word not in trained):
            raise UserError(
                f"view {word!r}: the model never saw one of {modality}, only {', '.join(trained) or 'none'}"
            )
    for name, words in tables.items():
        if len(both := [word for word in MODALITIES[modality].words(view) if word in words]) > 1:
            raise UserError(f"view {view!r}: {' and '.join(both)} are both a {name}: give one")


def _spoken(name: str) -> str:
    if name == "sources":
        return "an image"
    return ("an " if name == "image" else "a ") + name if "_" not in name else name


def _likeliest(
    template: Template,
    room: int,
    stream: np.random.Generator,
    draft: Callable[[tuple[int, ...]], Draft],
    score: Score,
) -> tuple[Draft, int]:
    """The layout whose lengths of gaps are the most probable, and how many were tried.

    A length is judged before anything is filled in: by p(slot length) p(given words and ``<eos>`` | image, layout), in
    which the gaps stay masked and so are summed over. Under equal chances of all lengths it is their posterior.
    First `CANDIDATES` combinations are tried, then of the best of them each gap by turns is varied.
    """
    tried: dict[tuple[int, ...], float] = {}

    def best_of(lengths: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        drafts = {one: draft(one) for one in lengths if one not in tried}
        if drafts:
            values = score(list(drafts.values()))
            tried.update({one: v + drafts[one].prior for one, v in zip(drafts, values, strict=True)})
        return min(tried, key=tried.__getitem__)

    lengths = template.lengths(room, stream)
    if len(lengths) == 1:
        return draft(lengths[0]), 1
    best = best_of(lengths)
    for gap in range(len(best)):
        best = best_of(template.vary(best, gap, room))
    return draft(best), len(tried)


class Reader:
    """Makes rows of requests, with the tokenizers of one model and what it saw in training.

    Args:
        absent: in training, images and reports were left off the canvas; then what is not known is left off here too.
    """

    def __init__(self, joint: JointTokenizer, slots: Slots, views: Views | None = None, absent: bool = False) -> None:
        self.joint, self.slots, self.views, self.absent = joint, slots, views or {}, absent
        self.side = joint.image.config.resolution
        self.grid = joint.image.grid(self.side, self.side)[0]
        self.place = Geometry(self.side, joint.image.config.fit)

    @cached_property
    def words(self) -> Words:
        """The text tokenizer as gaps need it."""
        return Words(self.joint.text, self.joint.vocabulary)

    def check(self, task: Task, request: Request) -> int:
        """All that can be checked before images are encoded; returns the longest row that the request can need.

        Raises:
            UserError: anything wrong with the request but an image that cannot be read.
        """
        try:
            check(task, request)
            rule = TASKS[task]
            rule.region(request, self.place, self.grid)
            template = rule.template(request)
            named = [(request.domain, request.view), *((one.modality, one.view) for one in request.sources)]
            for modality, view in named:
                if modality not in MODALITIES or (self.views and modality not in self.views):
                    known = ", ".join(self.views or MODALITIES)
                    raise UserError(f"unknown modality {modality!r}: the model knows {known}")
                check_view(modality, view, self.joint.vocabulary, self.views.get(modality))
            if task == "translate":
                _check_sources(request)
            longest = self._longest(task, request, template)
        except UserError as error:
            raise UserError(f"{request.where}{error}") from error
        frames = [self.joint.vocabulary.frame("image", *one) for one in named]
        frames += [self.joint.vocabulary.frame("report", "text")] if longest else []
        return len(named) * self.grid**2 + longest + sum(len(ids) for frame in frames for ids in frame)

    def _longest(self, task: Task, request: Request, template: Template | None) -> int:
        """Positions of the longest slot that a report of the request can get; 0: there is none."""
        if template is None and self._leaves_out(task):
            return 0
        slots = self.slots.get(request.domain)
        if slots is None:
            raise UserError(f"task {task}: the model saw no report of {request.domain}")
        if template is None or template.pieces == (Gap(),):
            return max(slots)
        fixed = self.words.fit(template, self.joint.slot.longest)
        wanted = self._size(fixed + sum(gap.high or 0 for gap in template.gaps))
        return max(max(slots), wanted) if Gap() in template.pieces else wanted

    def _leaves_out(self, task: Task) -> bool:
        """Whether a report that is not known has no place on the canvas either."""
        return task == "translate" and self.absent

    def read(self, task: Task, request: Request, score: Score) -> Given:
        """The request as positions; `score` chooses the lengths of gaps.

        Raises:
            UserError: the image cannot be read, or what `check` finds.
        """
        try:
            return self._read(task, request, score)
        except UserError as error:
            raise UserError(f"{request.where}{error}") from error

    def _read(self, task: Task, request: Request, score: Score) -> Given:
        rule = TASKS[task]
        regenerate, pixels = rule.region(request, self.place, self.grid)
        codes, picture = np.full((self.grid, self.grid), -1), None
        if request.image is not None:
            gray = MODALITIES[request.domain].gray
            prepared = self.joint.image.prepare(request.image, gray)
            codes = self.joint.image_codes(Image(request.domain, prepared)).cpu().numpy()
            picture = prepared.convert("L") if gray else prepared
        template = rule.template(request)
        told = " ".join(MODALITIES[request.domain].words(request.view))
        view = told or ("" if picture is not None else self._drawn_view(request))
        shown = np.where(regenerate, -1, codes).ravel()
        ids = np.where(shown < 0, self.joint.vocabulary.mask, shown + self.joint.vocabulary.image[0]).tolist()
        image, given = Segment("image", request.domain, ids, view), []
        pictures = []
        for one in request.sources:
            prepared = self.joint.image.prepare(one.pixels, MODALITIES[one.modality].gray)
            given.append(
                Segment(
                    "image",
                    one.modality,
                    self.joint.code_ids(self.joint.image_codes(replace(one, pixels=prepared))),
                    one.view.lower(),
                )
            )
            pictures.append(
                (name_of(one.modality, one.view), prepared.convert("L") if MODALITIES[one.modality].gray else prepared)
            )
        images = sorted([*given, image], key=lambda one: view_order(one.modality, one.view)) if given else [image]
        made = next(number for number, one in enumerate(images) if one is image)
        stream = np.random.default_rng(np.random.SeedSequence(request.stream))

        def draft(lengths: tuple[int, ...] = (), size: int | None = None) -> Draft:
            return self._draft(images, made, regenerate, template, lengths, size)

        tried = 1
        fixed = 0 if template is None else self.words.fit(template, self.joint.slot.longest)
        if template is None and self._leaves_out(task):
            best = draft(size=0)
        elif template is None or Gap() in template.pieces:
            trained = {n: count for n, count in self.slots[request.domain].items() if n > fixed}
            sizes, counts = zip(*sorted((trained or {self._size(fixed): 1}).items()), strict=True)
            best = draft(size=int(stream.choice(sizes, p=np.array(counts) / sum(counts))))
        else:
            best, tried = _likeliest(template, self.joint.slot.longest - 1 - fixed, stream, draft, score)
        return Given(request, codes, regenerate, pixels, picture, best, template, view, tuple(pictures), tried)

    def _drawn_view(self, request: Request) -> str:
        """A view as often as it occurred in training."""
        seen = self.views.get(request.domain, {})
        if not seen:
            return ""
        stream = np.random.default_rng(np.random.SeedSequence(request.stream, spawn_key=(1,)))
        counts = np.array(list(seen.values()))
        return list(seen)[int(stream.choice(len(seen), p=counts / counts.sum()))]

    def _draft(
        self,
        images: Sequence[Segment],
        made: int,
        regenerate: np.ndarray,
        template: Template | None,
        lengths: tuple[int, ...],
        size: int | None,
    ) -> Draft:
        """One layout in which image number `made` is the one asked for; without a size, its slot is as long as that of
        such a report in training; with size 0 there is none.
        """
        slot, prior, report = None, 0.0, len(images)
        if size is None:
            assert template is not None
            size = self._size(self.words.fit(template, self.joint.slot.longest) + sum(lengths))
            slots = self.slots.get(images[made].modality, {})
            prior = -math.log((slots.get(size, 0) + 1) / (sum(slots.values()) + len(slots) + 1))
        if template is not None:
            slot = self.words.slot(template, lengths, size)
        words = slot.ids if slot else [self.joint.vocabulary.mask] * size
        row = layout([*images, *([Segment("report", "text", words)] if size else [])], self.joint.vocabulary)
        generate, rule = np.zeros(len(row.ids), dtype=bool), np.full(len(row.ids), FREE)
        generate[row.segment == made] = regenerate.ravel()
        if slot is not None:
            generate[row.segment == report], rule[row.segment == report] = slot.generate, slot.rule
        return Draft(row, made, report if size else -1, generate, rule, slot, prior)

    def _size(self, tokens: int) -> int:
        """Positions of a slot for so many tokens and ``<eos>``, by the rule of training."""
        multiple, longest = self.joint.slot.multiple, self.joint.slot.longest
        return min(-(-(tokens + 1) // multiple) * multiple, longest)
