"""A trained model with its tokenizers: sample studies, score studies. What a notebook imports."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from medim.canvas import ROLES, Canvas
from medim.data.studies import Image, Study
from medim.diffusion import Denoiser, groups_of, token_nll
from medim.embedding import Embeddings
from medim.errors import UserError
from medim.given import TASKS, Draft, Given, Reader, Request, Slots, Task, Views
from medim.likelihood import NLL, Fit, Ranking, Scorer
from medim.loading import ASSETS as ASSETS  # a part of this module for others, as is resolve
from medim.loading import load_network, resolve
from medim.model import adapters
from medim.model.denoiser import BoundDenoiser
from medim.model.medim import MeDiMModel
from medim.pictures import Pixels
from medim.sampling import Cost, Means, Plan, Sampling, halton_order, sample
from medim.spinning import mean_of, spun
from medim.template import Forbidding
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import MODALITIES

BOUND_TIMES = 32  # forward passes that compare fillings of different lengths


@dataclass(frozen=True)
class Sample:
    """A generated study. What was not given is synthetic.

    Attributes:
        picture: None if no image was given or made (infill of a report alone).
        parts: the report piece by piece, and whether each was given.
        codes: int [h, w] of `picture`, -1 where none.
        given_codes: int [h, w] of the given image, -1 where none.
        regenerated: bool [h, w]: these codes were made, all others are `given_codes`.
        view: what was told of the picture, such as ``"t2 axial"``.
        sources: the images that a translation was given, with their names.
    """

    id: str
    task: Task
    domain: str
    picture: PIL.Image.Image | None
    parts: tuple[tuple[str, bool], ...]
    codes: np.ndarray
    given_codes: np.ndarray
    regenerated: np.ndarray
    stats: dict[str, Any] = field(default_factory=dict)
    view: str = ""
    sources: tuple[tuple[str, PIL.Image.Image], ...] = ()

    @property
    def image(self) -> PIL.Image.Image:
        """The picture.

        Raises:
            ValueError: the sample has none.
        """
        if self.picture is None:
            raise ValueError(f"{self.id}: no image was given or made")
        return self.picture

    @property
    def report(self) -> str:
        """The report, empty if none was given or made."""
        return "".join(text for text, _ in self.parts)

    @property
    def given(self) -> str | None:
        """What was not generated: ``image``, ``report``, ``part of the image``, sources by name, several, or None."""
        kept = (self.given_codes >= 0) & ~self.regenerated
        words = [given for _, given in self.parts]
        shares = {"image": (kept.any(), kept.all()), "report": (any(words), all(words))}
        said = [name for name, _ in self.sources]
        said += [name if whole else f"part of the {name}" for name, (some, whole) in shares.items() if some]
        return " and ".join(said) or None


class MeDiM:
    """Model, tokenizers and sampling defaults.

    Example:
        >>> model = MeDiM.from_pretrained("demo")  # doctest: +SKIP
        >>> model.sample(task="pair", domain="xray", n=4, seed=0)[0].report  # doctest: +SKIP
    """

    def __init__(
        self,
        model: MeDiMModel,
        joint: JointTokenizer,
        slots: Slots,
        sampling: Sampling,
        name: str,
        views: Views | None = None,
    ) -> None:
        self.model, self.joint, self.slots, self.name, self.views = model.eval(), joint, slots, name, views or {}
        self.sampling = sampling if model.config.condition_dropout else sampling.without_guidance()
        self.reader = Reader(joint, slots, self.views, model.config.absent > 0)

    @classmethod
    def from_pretrained(
        cls, name: str | Path, device: str | torch.device = "cpu", base: str | Path | None = None
    ) -> MeDiM:
        """Load a model folder, the shipped ``demo``, ``user/name`` of the hub, or adapters, merged into their base.

        Args:
            base: where that model is now, if it was moved: a folder of ours, or of its plain backbone.

        Raises:
            UserError: no such folder, an incomplete one, tokenizers that are not the checkpoint's, or another base.
        """
        folder = resolve(name)
        joint = JointTokenizer.from_pretrained(folder)
        model = load_network(folder, base)
        if model.vocabulary != joint.vocabulary:
            raise UserError(
                f"{folder}: config.json and canvas.json disagree about the vocabulary; the folder was mixed up"
            )
        slots = _read_json(folder / "report_slots.json")
        counts = {domain: {int(k): v for k, v in histogram.items()} for domain, histogram in slots.items()}
        model.to(device)  # type: ignore[arg-type]
        views = _read_json(folder / "views.json") if (folder / "views.json").is_file() else None
        return cls(model, joint, counts, read_sampling(folder), str(name), views)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a self-contained folder; `medim.hub.push_to_hub` publishes one."""
        save_folder(Path(folder), self.model, self.slots, self.views, joint=self.joint, sampling=self.sampling)

    @property
    def domains(self) -> tuple[str, ...]:
        """Image modalities that the model was trained on.

        Raises:
            UserError: none: it comes from `medim init`.
        """
        if not self.slots and not self.views:
            raise UserError(f"{self.name}: was never trained; train it first: train.py CONFIG init={self.name}")
        return tuple(dict.fromkeys((*self.slots, *self.views)))

    def sample(
        self,
        task: str = "pair",
        domain: str | None = None,
        n: int = 1,
        seed: int = 0,
        image: PIL.Image.Image | str | Path | None = None,
        report: str | None = None,
        mask: PIL.Image.Image | str | Path | None = None,
        batch_size: int = 16,
        sampling: Sampling | None = None,
        **given: Any,
    ) -> list[Sample]:
        """Make `n` studies; sample i is a pure function of (seed, i), whatever the batch size.

        Args:
            image: the image that is given, or of which a part is; a file or a picture.
            report: the report that is given; for task infill with gaps, such as ``"Heart [...]. No [...2-3]."``.
            mask: task inpaint: what is to be regenerated; a file or a picture as large as `image`.
            given: more fields of `Request`: view, sources, box, keep_image, keep_report, gap, paste_back.

        Raises:
            UserError: `n` < 1, an unknown task or domain, something missing or superfluous that is given, or guidance
                asked of a model that was trained without.
        """
        if n < 1:
            raise UserError(f"n={n}: give at least 1 sample to make")
        image, mask = (Path(one) if isinstance(one, str) else one for one in (image, mask))
        domain = domain or self.domains[0]
        requests = [
            Request(f"{domain}-{task}-{i:05d}", domain, (seed, i), image, report, mask=mask, **given) for i in range(n)
        ]
        return list(self.generate(task, requests, batch_size=batch_size, sampling=sampling))

    def generate(
        self,
        task: str,
        requests: Sequence[Request],
        *,
        batch_size: int = 16,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
        note: Callable[[str], None] | None = None,
    ) -> Iterator[Sample]:
        """Make one sample for each request, batch by batch, once all of them are checked.

        Args:
            batch_size: rows of a forward pass; results do not depend on it.
            progress: called with the number of samples done since the last call.
            note: called with a line on what was asked for and is not needed.

        Raises:
            UserError: a mistake in any of the requests, at once; an image that cannot be read, when its turn comes.
        """
        sampling = sampling or self.sampling
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give at least 1")
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        self._check(task, requests, sampling)
        if task == "translate" and sampling.spin > 1:
            if sampling.spin > (code := self.joint.image.downsampling):
                raise UserError(f"spin={sampling.spin}: a code of {self.name} is {code} pixels wide: at most {code}")
            return self._spun(requests, batch_size, sampling, progress, note)

        def samples() -> Iterator[Sample]:
            given = (self._read(task, request, batch_size) for request in requests)
            for batch in _batches(given, batch_size):
                yield from self._batch(task, batch, sampling, note)
                if progress is not None:
                    progress(len(batch))

        return samples()

    def _spun(
        self,
        requests: Sequence[Request],
        batch_size: int,
        sampling: Sampling,
        progress: Callable[[int], None] | None,
        note: Callable[[str], None] | None,
    ) -> Iterator[Sample]:
        """Translations, each the mean over shifted sources (`medim.spinning`)."""
        spin, code, plain = sampling.spin, self.joint.image.downsampling, replace(sampling, spin=1)
        together = max(1, batch_size // spin**2)
        for first in range(0, len(requests), together):
            some = [spun(one, self.joint.image, spin) for one in requests[first : first + together]]
            flat = [one for each in some for one in each]
            made = self.generate("translate", flat, batch_size=batch_size, sampling=plain, note=note)
            for _ in some:
                yield mean_of(list(itertools.islice(made, spin**2)), spin, code)
            if progress is not None:
                progress(len(some))

    def check_sampling(self, sampling: Sampling) -> None:
        """Refuse plans that the model cannot follow.

        Raises:
            UserError: guidance asked of a model that was trained without.
        """
        if (sampling.report.guidance or sampling.image.guidance) and not self.model.config.condition_dropout:
            raise UserError(
                f"guidance: {self.name} was trained without condition dropout, so it knows no image without its report "
                "and no report without its image; use guidance 0"
            )

    def _check(self, task: Task, requests: Sequence[Request], sampling: Sampling) -> None:
        self.check_sampling(sampling)
        limit = self.model.config.backbone.get("max_position_embeddings") or math.inf
        for request in requests:
            if request.domain not in self.domains:
                raise UserError(
                    f"{request.where}unknown domain {request.domain!r}: {self.name} knows {', '.join(self.domains)}"
                )
            length = self.reader.check(task, request)
            if length > limit:
                raise UserError(
                    f"{request.where}a canvas of {length} positions is longer than the {limit} that the backbone of "
                    f"{self.name} knows (max_position_embeddings): use a shorter report"
                )

    def _read(self, task: Task, request: Request, batch_size: int) -> Given:
        """The request as positions, its gaps as long as is most probable."""
        started, spent = time.perf_counter(), 0

        def score(drafts: Sequence[Draft]) -> list[float]:
            nonlocal spent
            bounds: list[float] = []
            for first in range(0, len(drafts), batch_size):
                bounds += self._bounds(drafts[first : first + batch_size], request.stream)
                spent += BOUND_TIMES
            return bounds

        given = self.reader.read(task, request, score)
        return replace(given, spent=spent, seconds=time.perf_counter() - started)

    @torch.no_grad()
    def _batch(
        self, task: Task, batch: Sequence[Given], sampling: Sampling, note: Callable[[str], None] | None
    ) -> Iterator[Sample]:
        started = time.perf_counter()
        means = Means(self.joint.image.codebook.to(self.model.device), self.joint.vocabulary.image[0])
        ids, cost, used = self._fill(batch, sampling, note, means if sampling.mean else None)
        final = ids.cpu().numpy()
        studies = [
            self._decode(given, final[i, : len(given.draft.row.ids)], None if means.values is None else means.values[i])
            for i, given in enumerate(batch)
        ]
        seconds = (time.perf_counter() - started) / len(batch)
        for given, passes, (picture, parts, codes) in zip(batch, cost.row_passes, studies, strict=True):
            request, made = given.request, given.draft.generate
            roles = [
                ROLES[role] for n, role in enumerate(given.draft.row.roles) if made[given.draft.row.segment == n].any()
            ]
            stats = {
                "plan": sampling.describe(roles),
                "forward_passes": given.spent + passes,
                "seconds": round(given.seconds + seconds, 3),
            }
            stats |= used
            if given.tried > 1:
                stats["lengths_tried"] = given.tried
            if request.paste_back and given.picture is not None:
                stats["paste_back"] = True
            about = (request.id, task, request.domain, picture, parts, codes, given.codes, given.regenerate, stats)
            yield Sample(*about, given.view, given.sources)

    def _fill(
        self,
        batch: Sequence[Given],
        sampling: Sampling,
        note: Callable[[str], None] | None,
        means: Means | None = None,
    ) -> tuple[Int[Tensor, "B L"], Cost, dict[str, float]]:
        """The ids of the filled rows, what it cost, the largest guidance used and, if any, the drift of memory."""
        canvas, generate, rule = self._canvas([given.draft for given in batch])
        mask, device, cost = self.joint.vocabulary.mask, canvas.ids.device, Cost()
        seeds = [np.random.SeedSequence(given.request.stream).generate_state(1, np.uint64)[0] for given in batch]
        generators = [torch.Generator(device).manual_seed(int(seed >> 1)) for seed in seeds]
        side = self.joint.image.config.resolution
        ranks = torch.nn.functional.pad(halton_order(*self.joint.image.grid(side, side)), (1, 0), value=-1)
        ids, scales, drifts = canvas.ids, [0.0], []
        for whole, plans in self._phases(canvas, generate, sampling):
            where = torch.stack([w for _, w in plans]).any(0)
            if whole is None or not bool((whole & (ids != mask)).any()):
                # nothing is known that the other branch could be without
                plans = [(replace(plan, guidance=0.0), w) for plan, w in plans]
            condition = self._weighted(batch, canvas, whole, sampling)
            for plan, w in plans:
                positions = int(w.sum(1).max())
                if note is not None and plan.steps is not None and plan.capped(positions) < plan.steps:
                    note(f"{plan.steps} steps for {positions} positions: as many steps as positions are run")
            bound = self.model.denoiser(canvas, where, refresh=sampling.refresh)
            ids = sample(
                self._ruled(bound, rule),
                ids,
                where,
                plans,
                mask_id=mask,
                generator=generators,
                condition=condition,
                order=ranks.to(device)[canvas.place],
                schedule=self.model.schedule,
                cost=cost,
                means=means,
            )
            scales += [plan.guidance for plan, _ in plans]
            drifts += [] if bound.drift is None else [bound.drift]
        used = {"guidance": max(scales)} | ({"cache_drift": max(drifts)} if drifts else {})
        return ids, cost, used

    def _canvas(self, drafts: Sequence[Draft]) -> tuple[Canvas, Bool[Tensor, "B L"], Int[Tensor, "B L"]]:
        """Rows as a canvas, what is generated of it, and the rule of each position."""
        canvas = Canvas.collate([draft.row for draft in drafts], self.joint.vocabulary.eos).to(self.model.device)
        length = canvas.ids.shape[1]

        def padded(arrays: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack([np.pad(one, (0, length - len(one))) for one in arrays])).to(
                canvas.ids.device
            )

        return canvas, padded([draft.generate for draft in drafts]), padded([draft.rule for draft in drafts])

    def _ruled(self, denoiser: BoundDenoiser, rule: Int[Tensor, "B L"]) -> Denoiser:
        """A denoiser without what the gaps of a report must not hold."""
        return Forbidding(denoiser, rule, self.reader.words.forbidden.to(rule.device)) if bool(rule.any()) else denoiser

    def _phases(
        self, canvas: Canvas, generate: Bool[Tensor, "B L"], sampling: Sampling
    ) -> Iterator[tuple[Bool[Tensor, "B L"] | None, list[tuple[Plan, Bool[Tensor, "B L"]]]]]:
        """What guidance's other branch does not see (the segments of which nothing is generated), and what is generated
        by which plan: one after the other."""
        where = {role: canvas.has_role(role) for role in ("report", "image")}
        plans = {"report": sampling.report, "image": sampling.image}
        made = [role for role in where if bool((where[role] & generate).any())]
        if sampling.order == "together" and len(made) > 1:
            yield None, [(plans[role], where[role] & generate) for role in made]
            return
        for role in made if sampling.order == "report-first" else made[::-1]:
            now = where[role] & generate
            yield canvas.outside(now) & (canvas.segment >= 0), [(plans[role], now)]

    def _weighted(
        self, batch: Sequence[Given], canvas: Canvas, whole: Bool[Tensor, "B L"] | None, sampling: Sampling
    ) -> Bool[Tensor, "B L"] | list[tuple[Bool[Tensor, "B L"], float]] | None:
        """What guidance's other branches do not see, by the names that have weights of their own."""
        if whole is None or not sampling.weights:
            return whole
        names = [
            [{ROLES[r], m, *v.lower().split()} for r, m, v in zip(row.roles, row.modalities, row.views, strict=True)]
            for row in (given.draft.row for given in batch)
        ]
        rest = whole
        parts: list[tuple[Tensor, float]] = []
        for name, weight in sampling.weights.items():
            picked = torch.zeros_like(canvas.role, dtype=torch.bool)
            for b, segments in enumerate(names):
                for number, words in enumerate(segments):
                    picked[b, number] = set(name.lower().split()) <= words
            here = rest & picked.gather(1, canvas.segment.clamp(min=0))
            parts.append((here, float(weight)))
            rest = rest & ~here
        return [part for part in (*parts, (rest, 1.0)) if bool(part[0].any())]

    @torch.no_grad()
    def _bounds(self, drafts: Sequence[Draft], stream: tuple[int, ...]) -> list[float]:
        """Of each row, a bound of -log p(given part of the report | the rest, gaps unknown) in nats.

        Estimated as `medim.diffusion.nelbo_tokens` says, but the gaps are masked at every noise level, which counts
        them, as it does in training. The same given tokens are masked in every row (common random numbers).
        """
        canvas, generate, _ = self._canvas(drafts)
        mask, report = self.joint.vocabulary.mask, canvas.has_role("report")
        given, unknown = report & ~generate, (canvas.ids == mask).float()
        denoiser = self.model.denoiser(canvas, report)
        groups, n, gaps = (
            groups_of(denoiser, given),
            given.sum(1, keepdim=True),
            (report & generate).sum(1, keepdim=True),
        )
        number = (given.cumsum(1) - 1).clamp(min=0)  # of a given token among those of its row
        random = np.random.default_rng(np.random.SeedSequence(stream, spawn_key=(0,)))
        total = torch.zeros(len(drafts), device=n.device)
        for stratum in range(BOUND_TIMES):
            u, noise = (
                random.random(),
                torch.from_numpy(random.random(self.joint.slot.longest, np.float32)).to(n.device),
            )
            count = torch.minimum(((stratum + u) / BOUND_TIMES * n).long() + 1, n)
            masked = torch.where(given, noise[number], torch.inf).argsort(1).argsort(1) < count
            level = torch.where(report, self.model.schedule.inverse(1 - (count + gaps) / (n + gaps)), unknown)
            nll = token_nll(denoiser, torch.where(masked, mask, canvas.ids), level, canvas.ids, groups, mask_id=mask)
            total += torch.where(masked, nll * n / count, 0.0).sum(1) / BOUND_TIMES
        return total.tolist()

    def _decode(
        self, given: Given, ids: np.ndarray, expected: Float[Tensor, "L E"] | None = None
    ) -> tuple[PIL.Image.Image | None, tuple[tuple[str, bool], ...], np.ndarray]:
        """Picture, report piece by piece, and codes of a filled row."""
        segment, codes, picture = given.draft.row.segment, given.codes, given.picture
        if given.regenerate.any():
            made = ids[segment == given.draft.image]
            codes = self.joint.grid(made).numpy()
            picture = self.joint.picture(made, given.request.domain)
            if expected is not None:
                picture = self._expected(given, expected[: len(segment)][segment == given.draft.image], codes)
            if given.request.paste_back and given.picture is not None:
                picture.paste(given.picture, mask=PIL.Image.fromarray(~given.pixels))
        slot = given.draft.slot
        parts = () if slot is None else self.reader.words.read(slot, ids[segment == given.draft.report].tolist())
        return picture, parts, codes

    def _expected(self, given: Given, vectors: Float[Tensor, "_ E"], codes: Int[np.ndarray, "h w"]) -> PIL.Image.Image:
        """The picture of the vectors that are expected where codes were made, and of the codes elsewhere."""
        image = self.joint.image
        own = image.codebook[torch.from_numpy(codes)].to(vectors.device)
        made = torch.from_numpy(given.regenerate)[..., None].to(vectors.device)
        mixed = torch.where(made, vectors.view(own.shape), own)
        return image.decode_vectors(mixed, MODALITIES[given.request.domain].gray)

    def _scorer(self, n_times: int, seed: int, batch_size: int, progress: Callable[[int], None] | None) -> Scorer:
        return Scorer(
            self.model, self.joint, self.domains, self.name,
            n_times=n_times, seed=seed, batch_size=batch_size, progress=progress,
        )  # fmt: skip

    def check(self, studies: Sequence[Study]) -> None:
        """Raise what `nll`, `fit` and `rank` would raise of these studies, without scoring them."""
        self._scorer(1, 0, 1, None).check(studies)

    def nll(
        self,
        studies: Sequence[Study],
        *,
        roles: Sequence[str] = ("report", "image"),
        n_times: int = 16,
        seed: int = 0,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[NLL]:
        """Bound -log2 p(roles | the rest of the study) by one shared noise level over all generated positions.

        A study's bits are a pure function of the study, its id, `n_times` and `seed`, up to rounding.

        Args:
            roles: what is scored; the other segments are given. The bound of both is a bound on the joint.
            n_times: noise levels a study; the standard error is over them.
            batch_size: rows in a forward pass: changes the speed, not the bits.
            progress: called with the number of studies done since the last call.

        Raises:
            UserError: a study without exactly one image of a known domain, or without a report that fits its slot.
        """
        return self._scorer(n_times, seed, batch_size, progress).nll(studies, roles)

    def embed(
        self,
        images: Sequence[PIL.Image.Image | str | Path | Pixels] = (),
        reports: Sequence[str] = (),
        domain: str | None = None,
        batch_size: int = 32,
    ) -> Float[Tensor, "N E"]:
        """Embeddings of length 1 of images, then of reports: the likeness of two is their product.

        Args:
            domain: of the images.

        Raises:
            UserError: a model without embeddings, an unknown domain, an image that cannot be read, an empty report.
        """
        domain = domain or self.domains[0]
        if domain not in self.domains:
            raise UserError(f"unknown domain {domain!r}: {self.name} knows {', '.join(self.domains)}")
        made = [Image(domain, Path(one) if isinstance(one, str) else one) for one in images]
        return self.embeddings(batch_size).of(made, reports)

    def embeddings(self, batch_size: int = 32) -> Embeddings:
        """What makes embeddings; raises UserError for a model without any."""
        return Embeddings(self.model, self.joint, self.name, batch_size)

    def fit(
        self,
        studies: Sequence[Study],
        *,
        direction: str = "both",
        n_times: int = 8,
        seed: int = 0,
        batch_size: int = 16,
        progress: Callable[[int], None] | None = None,
    ) -> list[Fit]:
        """Bits of mutual information of each study's image and report (`medim.likelihood`): above 0, they fit.

        Studies with the same id share their noise, so that their fits may be compared.

        Args:
            direction: ``report`` is log2 p(report|image) - log2 p(report), ``image`` the other way round, ``both`` a
                mean of the two (`medim.likelihood.REPORT_SHARE`).

        Raises:
            UserError: as `nll`; a model that was trained without condition dropout.
        """
        return self._scorer(n_times, seed, batch_size, progress).fit(studies, direction)

    def rank(
        self,
        image: PIL.Image.Image | str | Path | Pixels,
        reports: Sequence[str],
        *,
        domain: str | None = None,
        id: str = "image",
        direction: str = "both",
        n_times: int = 8,
        seed: int = 0,
        batch_size: int = 16,
    ) -> Ranking:
        """Which of at least two reports fits an image best, all with the same masks; raises what `fit` raises.

        Args:
            id: names the image in messages, and with `seed` decides its masks.
        """
        picture = Image(domain or self.domains[0], Path(image) if isinstance(image, str) else image)
        return self._scorer(n_times, seed, batch_size, None).rank(picture, reports, id, direction)


def _batches(given: Iterator[Given], size: int) -> Iterator[list[Given]]:
    """Runs of at most `size` requests of one shape."""
    for _, run in itertools.groupby(given, key=lambda one: one.shape):
        while batch := list(itertools.islice(run, size)):
            yield batch


def save_folder(
    folder: Path,
    model: MeDiMModel,
    slots: Slots,
    views: Views | None = None,
    *,
    joint: JointTokenizer,
    sampling: Sampling,
) -> None:
    """Write what `MeDiM.from_pretrained` reads."""
    if model.lora is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        adapters.write_weights(folder, {name: p for name, p in model.named_parameters() if p.requires_grad})
    save_parts(folder, model, slots, views, joint=joint, sampling=sampling)


def save_parts(
    folder: Path,
    model: MeDiMModel,
    slots: Slots,
    views: Views | None = None,
    *,
    joint: JointTokenizer,
    sampling: Sampling,
) -> None:
    """Write a model folder but for its weights: config, tokenizers, report slots, views, sampling defaults."""
    if model.lora is not None:
        adapters.write_settings(folder, model.lora)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    joint.save_pretrained(folder)
    (folder / "report_slots.json").write_text(json.dumps(slots) + "\n")
    (folder / "views.json").write_text(json.dumps(views or {}) + "\n")
    (folder / "sampling.json").write_text(json.dumps(asdict(sampling), indent=1) + "\n")


def read_sampling(folder: Path) -> Sampling:
    """The sampling defaults of a model folder."""
    path = folder / "sampling.json"
    return Sampling.read(path) if path.is_file() else Sampling()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the folder is damaged") from error
