"""A trained model with its tokenizers: sample studies, score studies. What a notebook imports."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL.Image
import torch
from jaxtyping import Bool
from safetensors import SafetensorError
from torch import Tensor

from medim.canvas import Canvas, Row, Segment, layout
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.likelihood import NLL, Fit, Ranking, Scorer
from medim.model.medim import MeDiMModel
from medim.sampling import REVEALS, Cost, Plan, sample
from medim.tokenization.image import prepare_image
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import MODALITIES

ASSETS = Path(__file__).parent / "assets"
SHIPPED = ("demo",)
Task = Literal["pair", "report", "image"]
TASKS: tuple[Task, ...] = get_args(Task)
Order = Literal["report-first", "image-first", "together"]
GENERATES: dict[Task, tuple[str, ...]] = {"pair": ("report", "image"), "report": ("report",), "image": ("image",)}


@dataclass(frozen=True)
class Sampling:
    """How each segment is generated, and in which order a pair is; saved beside a model as `sampling.json`."""

    report: Plan = Plan("ancestral", steps=16)
    image: Plan = Plan("confidence", steps=16, schedule="cosine")
    order: Order = "report-first"

    def override(
        self, plan: str | None, steps: int | None, guidance: float | None, temperature: float | None
    ) -> Sampling:
        """The same with what a user asked for, on both segments."""
        if plan is not None and plan not in REVEALS:
            raise UserError(f"unknown plan {plan!r}: one of {', '.join(REVEALS)}")
        asked = {"name": plan, "steps": steps, "guidance": guidance, "temperature": temperature}
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        try:
            return replace(self, report=replace(self.report, **changes), image=replace(self.image, **changes))
        except ValueError as error:
            raise UserError(str(error)) from error

    def for_task(self, task: Task) -> str:
        """One line that says which plan made a sample, as the manifest has it."""
        plans = {"report": self.report, "image": self.image}
        parts = [f"{role}:{plans[role].name}/{plans[role].steps}" for role in GENERATES[task]]
        return f"{self.order} {' '.join(parts)}" if task == "pair" else parts[0]


@dataclass(frozen=True)
class Request:
    """One sample to make: what is given (an image, a report, neither) and its own random stream."""

    id: str
    domain: str
    stream: tuple[int, ...]
    image: PIL.Image.Image | Path | None = None
    report: str | None = None


@dataclass(frozen=True)
class Sample:
    """A generated study. All of it is synthetic; `given` names the part that was not generated."""

    id: str
    task: Task
    domain: str
    image: PIL.Image.Image
    report: str
    codes: np.ndarray  # [h, w]
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def given(self) -> str | None:
        """The role that was given: ``image``, ``report`` or None."""
        return {"pair": None, "report": "image", "image": "report"}[self.task]


class MeDiM:
    """Model, tokenizers and sampling defaults.

    Example:
        >>> model = MeDiM.from_pretrained("demo")  # doctest: +SKIP
        >>> model.sample(task="pair", domain="xray", n=4, seed=0)[0].report  # doctest: +SKIP
    """

    def __init__(
        self, model: MeDiMModel, joint: JointTokenizer, slots: dict[str, dict[int, int]], sampling: Sampling, name: str
    ) -> None:
        self.model, self.joint, self.slots, self.sampling, self.name = model.eval(), joint, slots, sampling, name

    @classmethod
    def from_pretrained(cls, name: str | Path, device: str | torch.device = "cpu") -> MeDiM:
        """Load a model folder, or the shipped ``demo``.

        Raises:
            UserError: no such folder, an incomplete one, or tokenizers that are not the checkpoint's.
        """
        folder = resolve(name)
        joint = JointTokenizer.from_pretrained(folder)
        model = _load_network(folder)
        if model.vocabulary != joint.vocabulary:
            raise UserError(
                f"{folder}: config.json and canvas.json disagree about the vocabulary; the folder was mixed up"
            )
        slots = _read_json(folder / "report_slots.json")
        counts = {domain: {int(k): v for k, v in histogram.items()} for domain, histogram in slots.items()}
        model.to(device)  # type: ignore[arg-type]
        return cls(model, joint, counts, _read_sampling(folder), str(name))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a self-contained folder."""
        save_folder(Path(folder), self.model, self.slots, joint=self.joint, sampling=self.sampling)

    @property
    def domains(self) -> tuple[str, ...]:
        """Image modalities that the model was trained on."""
        return tuple(self.slots)

    def sample(
        self,
        task: str = "pair",
        domain: str | None = None,
        n: int = 1,
        seed: int = 0,
        image: PIL.Image.Image | str | Path | None = None,
        report: str | None = None,
        batch_size: int = 16,
        sampling: Sampling | None = None,
    ) -> list[Sample]:
        """Make `n` studies; sample i is a pure function of (seed, i), whatever the batch size.

        Args:
            image: what a report is written for; a file or a picture.
            report: what an image is drawn for.

        Raises:
            UserError: `n` < 1, an unknown task or domain, a missing or a superfluous `image` or `report`.
        """
        if n < 1:
            raise UserError(f"n={n}: give at least 1 sample to make")
        if task not in TASKS:
            raise UserError(f"unknown task {task!r}: one of {', '.join(TASKS)}")
        given = Path(image) if isinstance(image, str) else image
        domain = domain or self.domains[0]
        requests = [Request(f"{domain}-{task}-{i:05d}", domain, (seed, i), given, report) for i in range(n)]
        return list(self.generate(task, requests, batch_size=batch_size, sampling=sampling))

    def generate(
        self,
        task: Task,
        requests: Sequence[Request],
        *,
        batch_size: int = 16,
        sampling: Sampling | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Iterator[Sample]:
        """Make one sample for each request, batch by batch.

        Args:
            progress: called with the number of samples done since the last call.
        """
        sampling = sampling or self.sampling
        if batch_size < 1:
            raise UserError(f"batch size {batch_size}: give at least 1")
        for request in requests:
            self._check(task, request)
        for first in range(0, len(requests), batch_size):
            batch = requests[first : first + batch_size]
            yield from self._batch(task, batch, sampling)
            if progress is not None:
                progress(len(batch))

    def _check(self, task: Task, request: Request) -> None:
        if request.domain not in self.domains:
            raise UserError(f"unknown domain {request.domain!r}: {self.name} knows {', '.join(self.domains)}")
        needed = {"image": task == "report", "report": task == "image"}
        for what, value in (("image", request.image), ("report", request.report)):
            if needed[what] and (value is None or value == ""):
                raise UserError(f"task {task} needs {'an image' if what == 'image' else 'a report'} to start from")
            if not needed[what] and value is not None:
                raise UserError(f"task {task} makes the {what} itself: leave the given {what} out")
        if isinstance(request.image, Path) and not request.image.is_file():
            raise UserError(f"image {request.image}: no such file")

    def _prepared(self, request: Request) -> PIL.Image.Image:
        """The given image as the model saw it, before the image tokenizer."""
        assert request.image is not None
        gray = MODALITIES[request.domain].gray
        picture = prepare_image(request.image, self.joint.image.config.resolution, gray)
        return picture.convert("L") if gray else picture

    def _row(self, request: Request, stream: np.random.Generator) -> Row:
        """The layout of a sample, [MASK] where something is to be made."""
        mask = self.joint.vocabulary.mask
        side = self.joint.image.config.resolution
        h, w = self.joint.image.grid(side, side)
        codes = [mask] * (h * w)
        if request.image is not None:
            codes = self.joint.code_ids(self.joint.image_codes(Image(request.domain, request.image)))
        if request.report is not None:
            report = self.joint.report_ids(request.report)
        else:
            lengths, counts = zip(*sorted(self.slots[request.domain].items()), strict=True)
            report = [mask] * int(stream.choice(lengths, p=np.array(counts) / sum(counts)))
        segments = [Segment("image", request.domain, codes), Segment("report", "text", report)]
        return layout(segments, self.joint.vocabulary)

    def _phases(
        self, task: Task, canvas: Canvas, sampling: Sampling
    ) -> Iterator[tuple[Bool[Tensor, "B L"], Bool[Tensor, "B L"] | None, Plan]]:
        """What is generated, given what, by which plan: one after the other."""
        where = {"report": canvas.has_role("report"), "image": canvas.has_role("image")}
        plans = {"report": sampling.report, "image": sampling.image}
        if task != "pair":
            other = "image" if task == "report" else "report"
            yield where[task], where[other], plans[task]
        elif sampling.order == "together":
            yield where["report"] | where["image"], None, replace(sampling.image, guidance=0.0)
        else:
            first, second = ("report", "image") if sampling.order == "report-first" else ("image", "report")
            yield where[first], None, replace(plans[first], guidance=0.0)
            yield where[second], where[first], plans[second]

    @torch.no_grad()
    def _batch(self, task: Task, requests: Sequence[Request], sampling: Sampling) -> Iterator[Sample]:
        started = time.perf_counter()
        seeds = [np.random.SeedSequence(request.stream) for request in requests]
        rows = [self._row(r, np.random.default_rng(s)) for r, s in zip(requests, seeds, strict=True)]
        vocabulary, device = self.joint.vocabulary, self.model.device
        canvas = Canvas.collate(rows, vocabulary.eos).to(device)
        generators = [torch.Generator(device).manual_seed(int(s.generate_state(1, np.uint64)[0] >> 1)) for s in seeds]
        ids, cost = canvas.ids, Cost()
        for generate, condition, plan in self._phases(task, canvas, sampling):
            ids = sample(
                self.model.denoiser(canvas, generate),
                ids,
                generate,
                plan,
                mask_id=vocabulary.mask,
                generator=generators,
                condition=condition,
                schedule=self.model.schedule,
                cost=cost,
            )
        final = ids.cpu().numpy()
        studies = [self.joint.decode(final[i, : len(row.ids)], row) for i, row in enumerate(rows)]
        seconds = (time.perf_counter() - started) / len(requests)
        for i, (request, row, study) in enumerate(zip(requests, rows, studies, strict=True)):
            picture = study.images[0].pixels if request.image is None else self._prepared(request)
            assert isinstance(picture, PIL.Image.Image)
            codes = self.joint.grid(final[i, : len(row.ids)][row.segment == 0]).numpy()
            stats = {
                "plan": sampling.for_task(task),
                "guidance": self._guidance(task, sampling),
                "forward_passes": cost.forward_passes,
                "seconds": round(seconds, 3),
            }
            report = study.report if request.report is None else request.report
            yield Sample(request.id, task, request.domain, picture, report, codes, stats)

    def _guidance(self, task: Task, sampling: Sampling) -> float:
        if task == "pair":
            scale = {"report-first": sampling.image, "image-first": sampling.report}.get(sampling.order)
            return scale.guidance if scale else 0.0
        return (sampling.report if task == "report" else sampling.image).guidance

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
        image: PIL.Image.Image | str | Path,
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


def save_folder(
    folder: Path, model: MeDiMModel, slots: dict[str, dict[int, int]], *, joint: JointTokenizer, sampling: Sampling
) -> None:
    """Write what `MeDiM.from_pretrained` reads: config and weights, tokenizers, report slots, sampling defaults."""
    model.save_pretrained(folder)
    joint.save_pretrained(folder)
    (folder / "report_slots.json").write_text(json.dumps(slots) + "\n")
    (folder / "sampling.json").write_text(json.dumps(asdict(sampling), indent=1) + "\n")


def resolve(name: str | Path) -> Path:
    """The folder of a model name.

    Raises:
        UserError: it does not exist or is not a model folder.
    """
    folder = ASSETS / str(name) if str(name) in SHIPPED else Path(name)
    if not folder.is_dir():
        raise UserError(f"{name}: no such model; give a folder such as runs/demo/final, or `demo` for the shipped one")
    for part in ("config.json", "canvas.json", "report_slots.json"):
        if not (folder / part).is_file():
            raise UserError(f"{name}: not a MeDiM model folder: {part} is missing")
    if not any(folder.glob("model*.safetensors")):
        raise UserError(f"{name}: not a MeDiM model folder: model.safetensors is missing")
    return folder


def _load_network(folder: Path) -> MeDiMModel:
    """The weights, all of them: `from_pretrained` alone would fill what is missing with random numbers."""
    try:
        loaded: Any = MeDiMModel.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        model, said = loaded
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder}: weights cannot be loaded ({' '.join(str(error).split())[:200]})") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if said[what]:
            name = sorted(map(str, said[what]))[0]
            raise UserError(
                f"{folder}: weights do not fit config.json: {len(said[what])} {what.split('_')[0]}, first {name}"
            )
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}); the folder is damaged") from error


def _read_sampling(folder: Path) -> Sampling:
    path = folder / "sampling.json"
    if not path.is_file():
        return Sampling()
    data = _read_json(path)
    try:
        return Sampling(Plan(**data["report"]), Plan(**data["image"]), data["order"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not sampling defaults ({error})") from error
