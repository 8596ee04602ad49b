"""How likely a study is under a model, and how well its image and its report fit each other.

Bits are bounds of -log2 p by `medim.diffusion.nelbo_tokens` (MDLM, arXiv 2406.07524, eq. 10; LLaDA, arXiv 2502.09992,
eq. 6). Writing I for an image and R for a report, the fit is their pointwise mutual information

    fit = log2 p(R|I) - log2 p(R) = log2 p(I|R) - log2 p(I),

which a model estimates in both directions (`Direction`). A part that is left out of a condition is wholly [MASK] and
told t=1, as condition dropout has taught. All four terms are bounds, so that a difference is an estimate and no bound;
with an exact denoiser both directions are the same number. The terms of a fit share their masks, and so do fits with
the same id and slot length: differences vary far less than what they are differences of.
Shape letters: T noise levels, L canvas length, h w code grid.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from medim.canvas import ROLES, Canvas, Row, Segment, layout
from medim.data.studies import Image, Study
from medim.diffusion import nelbo_tokens
from medim.errors import UserError
from medim.model.medim import MeDiMModel
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import KINDS, Kind

Direction = Literal["both", "report", "image"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
PAIR = ("report", "image")
REPORT_SHARE = 2 / 3  # of the direction report in both: chosen on validation X-rays (docs/LOG.md); it varies less
Progress = Callable[[int], None]


@dataclass(frozen=True)
class NLL:
    """Upper bound of a study's negative log likelihood: bits, their standard error, and positions, by modality.

    Attributes:
        total: bits of all that was scored, the bound itself; `total_error` is its standard error, which is not made of
            those of its parts, since they share their masks.
    """

    id: str
    bits: dict[Kind, float]
    standard_error: dict[Kind, float]
    tokens: dict[Kind, int]
    total: float
    total_error: float

    def bits_per_token(self, kind: Kind) -> float:
        """Bits of a kind divided by its positions."""
        return self.bits[kind] / max(1, self.tokens[kind])


@dataclass(frozen=True)
class Fit:
    """Estimate of the mutual information of an image and a report in bits; above 0 they fit better than chance."""

    id: str
    bits: float
    standard_error: float


@dataclass(frozen=True)
class Ranking:
    """Fits of several reports with one image, in the order given.

    Attributes:
        best: index of the greatest fit.
        margin: bits between it and the next; `margin_error` is the standard error of that difference, which is less
            than those of the two fits, since they share their masks.
    """

    fits: tuple[Fit, ...]
    best: int
    margin: float
    margin_error: float


@dataclass(frozen=True)
class Query:
    """What is to be bounded: -log p of the `scored` positions of a row given the others; [MASK] there is unknown."""

    row: Row
    scored: Bool[np.ndarray, "L"]
    seed: int  # of its noise

    @property
    def key(self) -> tuple[bytes, bytes, int]:
        """The same for queries with the same answer."""
        return self.row.ids.tobytes(), self.scored.tobytes(), self.seed


class Scorer:
    """Scores studies by a network; made anew for each call by `medim.pipeline.MeDiM`, whose methods these are.

    Args:
        domains: image modalities that the network was trained on.
        name: what a user calls the model.
        batch_size: rows in a forward pass; changes the speed, not the scores.
        progress: called with the number of studies done since the last call.
    """

    def __init__(
        self,
        network: MeDiMModel,
        joint: JointTokenizer,
        domains: Sequence[str],
        name: str,
        *,
        n_times: int,
        seed: int,
        batch_size: int,
        progress: Progress | None = None,
    ) -> None:
        for what, value in (("n_times", n_times), ("batch size", batch_size)):
            if value < 1:
                raise UserError(f"{what} {value}: give at least 1")
        self.network, self.joint, self.domains, self.name = network.eval(), joint, tuple(domains), name
        self.n_times, self.seed, self.batch_size = n_times, seed, batch_size
        self.progress = progress or (lambda done: None)

    # ------------------------------------------------------------------------------------------- what a user asks

    def nll(self, studies: Sequence[Study], roles: Sequence[str] = PAIR) -> list[NLL]:
        """Bound -log2 p(roles | the rest of the study) of each study; see `MeDiM.nll`."""
        if not roles or not set(roles) <= set(PAIR):
            raise ValueError(f"roles {tuple(roles)}: one or both of {PAIR}")
        self.check(studies)
        results = []
        for first in range(0, len(studies), self.batch_size):
            part = studies[first : first + self.batch_size]
            rows = [self.joint.encode(study) for study in part]
            queries = [Query(row, _has(row, *roles), self._noise(s.id)) for s, row in zip(part, rows, strict=True)]
            results += [
                _nll(s.id, query, terms) for s, query, terms in zip(part, queries, self._ask(queries), strict=True)
            ]
            self.progress(len(part))
        return results

    def fit(self, studies: Sequence[Study], direction: str = "both") -> list[Fit]:
        """Bits of mutual information of each study's image and report; see `MeDiM.fit`."""
        return [_fit(s.id, levels) for s, levels in zip(studies, self._fits(studies, direction), strict=True)]

    def rank(self, image: Image, reports: Sequence[str], name: str = "image", direction: str = "both") -> Ranking:
        """Which of several reports fits an image best; see `MeDiM.rank`."""
        if len(reports) < 2:
            raise UserError(f"study {name}: {len(reports)} report to rank: give at least 2")
        studies = [Study(name, name, (image,), report) for report in reports]
        levels = self._fits(studies, direction)
        fits = tuple(_fit(f"{name}-{k}", one) for k, one in enumerate(levels))
        best, second = sorted(range(len(fits)), key=lambda k: -fits[k].bits)[:2]
        margin = _fit(name, levels[best] - levels[second])
        return Ranking(fits, best, margin.bits, margin.standard_error)

    # --------------------------------------------------------------------------------------------- how it is found

    def _fits(self, studies: Sequence[Study], direction: str) -> list[Float[Tensor, "T"]]:
        """The fit of each study by noise level, in bits."""
        if direction not in DIRECTIONS:
            raise UserError(f"unknown direction {direction!r}: one of {', '.join(DIRECTIONS)}")
        if self.network.config.condition_dropout == 0:
            raise UserError(
                f"{self.name}: trained without condition dropout: it cannot tell how likely a report is without its "
                "image; train with objective.condition_dropout above 0"
            )
        self.check(studies)
        codes: dict[tuple[int, str], list[int]] = {}  # by picture, so that K reports encode it once
        asked, results = PAIR if direction == "both" else (direction,), []
        weights = torch.tensor([REPORT_SHARE, 1 - REPORT_SHARE] if direction == "both" else [1.0])
        size = max(1, self.batch_size // (2 * len(asked)))
        for first in range(0, len(studies), size):
            part = studies[first : first + size]
            queries = [query for study in part for query in self._four(study, asked, codes)]
            bits = [terms.sum(1) / math.log(2) for terms in self._ask(queries)]
            alone, given = torch.stack(bits).view(len(part), len(asked), 2, -1).unbind(2)
            results += list(((alone - given) * weights.unsqueeze(1)).sum(1))
            self.progress(len(part))
        return results

    def _four(self, study: Study, asked: Sequence[str], codes: dict[tuple[int, str], list[int]]) -> Iterable[Query]:
        """For each direction: the part alone, and the part given the other."""
        picture = study.images[0]
        key = id(picture.pixels), picture.modality
        if key not in codes:
            codes[key] = self.joint.code_ids(self.joint.image_codes(picture))
        segments = [
            Segment("image", picture.modality, codes[key]),
            Segment("report", "text", self.joint.report_ids(study.report)),
        ]
        row, seed = layout(segments, self.joint.vocabulary), self._noise(study.id)
        for role in asked:
            scored, other = _has(row, role), _has(row, *(r for r in PAIR if r != role))
            unknown = replace(row, ids=np.where(other, self.joint.vocabulary.mask, row.ids))
            yield from (Query(unknown, scored, seed), Query(row, scored, seed))

    def _ask(self, queries: Sequence[Query]) -> list[Float[Tensor, "T L"]]:
        """Nats of each query by noise level and position; equal queries are answered once."""
        # alike beside alike: what is given is computed once, and the rows of a pass are padded to its fullest
        distinct = sorted({query.key: query for query in queries}.values(), key=lambda query: int(query.scored.sum()))
        answers: dict[tuple[bytes, bytes, int], Tensor] = {}
        for first in range(0, len(distinct), self.batch_size):
            part = distinct[first : first + self.batch_size]
            canvas = Canvas.collate([query.row for query in part], self.joint.vocabulary.eos)
            scored = torch.zeros_like(canvas.valid)
            for i, query in enumerate(part):
                scored[i, : len(query.scored)] = torch.from_numpy(query.scored)
            canvas, scored = canvas.to(self.network.device), scored.to(self.network.device)
            terms = nelbo_tokens(
                self.network.denoiser(canvas, scored),
                canvas.ids,
                scored,
                mask_id=self.joint.vocabulary.mask,
                n_times=self.n_times,
                generator=[torch.Generator().manual_seed(query.seed) for query in part],
                schedule=self.network.schedule,
                at_once=max(1, self.batch_size // len(part)),
            ).cpu()
            answers |= {query.key: terms[:, i, : len(query.scored)] for i, query in enumerate(part)}
        return [answers[query.key] for query in queries]

    def _noise(self, name: str) -> int:
        """The seed of a study's noise: a function of its id alone, so that a score does not depend on a listing."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:8], "big") >> 1

    def check(self, studies: Sequence[Study]) -> None:
        """Before any work: what cannot be scored.

        Raises:
            UserError: it names the study.
        """
        if not studies:
            raise UserError("no studies to score")
        longest = self.joint.slot.longest - 1  # its last position is <eos>
        for study in studies:
            if len(study.images) != 1:
                raise UserError(f"study {study.id}: has {len(study.images)} images: one is needed")
            if not study.report.strip():
                raise UserError(f"study {study.id}: the report is empty")
            picture = study.images[0]
            if picture.modality not in self.domains:
                known = ", ".join(self.domains)
                raise UserError(f"study {study.id}: unknown domain {picture.modality!r}: {self.name} knows {known}")
            if isinstance(picture.pixels, Path) and not picture.pixels.is_file():
                raise UserError(f"study {study.id}: image {picture.pixels}: no such file")
            tokens = len(self.joint.text.encode(study.report))
            if tokens > longest:
                raise UserError(
                    f"study {study.id}: the report has {tokens} tokens, {self.name} takes {longest}: shorten it"
                )


def mean_and_error(levels: Float[Tensor, "T"]) -> tuple[float, float]:
    """The mean over noise levels and its standard error, NaN of one level.

    Levels are strata, so what they differ by as strata is no error: neighbours are compared, sum of (difference)^2 over
    2 T (T - 1) (Wolter, Introduction to Variance Estimation, chapter 8, estimator v2 of systematic samples). Too large
    rather than too small: neighbours still differ, and masks that avoid each other help the mean alone.
    """
    size = len(levels)
    error = math.sqrt(float(levels.diff().square().sum()) / (2 * size * (size - 1))) if size > 1 else math.nan
    return float(levels.mean()), error


def _fit(name: str, levels: Float[Tensor, "T"]) -> Fit:
    return Fit(name, *mean_and_error(levels))


def _nll(name: str, query: Query, terms: Float[Tensor, "T L"]) -> NLL:
    bits: dict[Kind, float] = {}
    error: dict[Kind, float] = {}
    tokens: dict[Kind, int] = {}
    for number, kind in enumerate(KINDS):
        here = query.scored & (query.row.kind == number)
        if here.any():
            bits[kind], error[kind] = mean_and_error(terms[:, torch.from_numpy(here)].sum(1) / math.log(2))
            tokens[kind] = int(here.sum())
    return NLL(name, bits, error, tokens, *mean_and_error(terms.sum(1) / math.log(2)))


def _has(row: Row, *names: str) -> Bool[np.ndarray, "L"]:
    """True at the positions of segments with one of these roles, as `Canvas.has_role` says of a batch."""
    role = np.array([*row.roles, -1])[row.segment]  # segment -1, a tag, finds the last
    return np.isin(role, [ROLES.index(name) for name in names])
