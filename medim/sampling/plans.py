"""Plans: how a sampler walks from all masked to none. Data only; `medim.sampling.walks` lays them out on a canvas."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from omegaconf import OmegaConf
from torch import Tensor
from yaml import YAMLError

from medim.diffusion import ScheduleName
from medim.errors import UserError

PlanName = Literal["ancestral", "confidence", "halton", "entropy", "threshold"]
GuidanceSchedule = Literal["constant", "linear"]
Remask = Literal["cap", "rescale"]
Order = Literal["report-first", "image-first", "together"]


@dataclass(frozen=True)
class Plan:
    """One way from t=1 to t=0. Plain data: `Plan(**json)` reads what `asdict` wrote.

    Attributes:
        name: which positions come next; the equations stand in `medim.sampling.walks`. ``ancestral``: random times.
            ``confidence``: the most probable drawn values. ``halton``: a fixed order. ``entropy``: as many as are
            nearly independent. ``threshold``: all that are certain.
        steps: forward passes at most. None: one position a pass (``entropy`` and ``threshold``: at least one). More
            than a row has positions is as many as it has, see `capped`; but remasking uses all of them.
        schedule: pace: the share 1 - alpha(1 - k/K) is still masked after pass k of K. Without effect on ``entropy``
            and ``threshold``, which set their own. What the denoiser is told is the noise level at which its own
            training schedule masks the share that is masked.
        temperature: divides the log-probabilities before a value is drawn; 0 takes the most probable.
        temperature_end: None, or where the temperature falls to: T = T_end + (T_start - T_end) m/n with m of a row's n
            positions still masked.
        top_k: only the k most probable values are drawn (after the temperature; ties with the k-th stay).
        top_p: only the smallest set of most probable values that holds this share is drawn (Holtzman et al. 2020,
            arXiv 1904.09751), after `top_k`.
        choice_temperature: confidence only: scale of the Gumbel noise on the log-confidence, falling to 0 at the last
            pass.
        gamma: entropy only: bound of what the positions of a pass may depend on each other, in nats.
        tau: threshold only: positions whose most probable value is more probable than this are revealed.
        block: None, or how many positions a row reveals before it goes on to those on their right (LLaDA, Nie et al.
            2025, arXiv 2502.09992; Arriola et al. 2025, arXiv 2503.09573). Blocks share the steps; with fewer steps
            than blocks, blocks are made larger.
        remask: ancestral only: None, or the schedule of ReMDM's remasking probability sigma.
        remask_eta: its scale: ``cap`` is sigma = min(eta, sigma_max), ``rescale`` is sigma = eta sigma_max.
        remask_from: it remasks only while the share of passes to come is at most this,
        remask_to: and at least this.
        remask_hold: None, or the clean share that is held in between (ReMDM-loop).
        patience: None, or the passes for which a row's most probable values must have stayed the same, each more
            probable than `patience_confidence`, for the row to take them all and stop.
        patience_confidence: see `patience`.
        guidance: scale w of classifier-free guidance: log p = (1 + w) log p(x|c) - w log p(x), normalised (Ho &
            Salimans 2022, arXiv 2207.12598, eq. 6); 0 runs one branch.
        guidance_schedule: ``constant``, or ``linear``: w (1 - t), that of MeDiM (arXiv 2510.06131) with w = 5.
        guidance_from: guidance only at t at most this (a late window); passes with no guided row run one branch.
    """

    name: PlanName = "ancestral"
    steps: int | None = 16
    schedule: ScheduleName = "linear"
    temperature: float = 1.0
    temperature_end: float | None = None
    top_k: int | None = None
    top_p: float = 1.0
    choice_temperature: float = 1.0
    gamma: float = 0.1
    tau: float = 0.9
    block: int | None = None
    remask: Remask | None = None
    remask_eta: float = 0.05
    remask_from: float = 1.0
    remask_to: float = 0.0
    remask_hold: float | None = None
    patience: int | None = None
    patience_confidence: float = 0.9
    guidance: float = 0.0
    guidance_schedule: GuidanceSchedule = "constant"
    guidance_from: float = 1.0

    def __post_init__(self) -> None:
        _known("plan", self.name, get_args(PlanName))
        _known("guidance schedule", self.guidance_schedule, get_args(GuidanceSchedule))
        if self.remask is not None:
            _known("remasking", self.remask, get_args(Remask))
        for name, unit in (("steps", "step"), ("top_k", "value"), ("block", "position"), ("patience", "pass")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: a plan needs at least one {unit}")
        for name in ("temperature", "choice_temperature", "gamma", "guidance"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative")
        if self.temperature_end is not None and not 0 <= self.temperature_end <= self.temperature:
            raise ValueError(f"temperature_end={self.temperature_end}: between 0 and temperature={self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: above 0 and at most 1")
        for name in ("tau", "patience_confidence", "guidance_from", "remask_eta", "remask_hold"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name}={value}: between 0 and 1")
        if not 0 <= self.remask_to <= self.remask_from <= 1:
            raise ValueError(f"remask_from={self.remask_from}, remask_to={self.remask_to}: 1 >= from >= to >= 0")
        if self.remask is None:
            if self.remask_hold is not None:
                raise ValueError("remask_hold needs `remask`")
        elif self.name != "ancestral" or self.steps is None or self.block or self.patience:
            raise ValueError("remask goes with ancestral and a number of steps, without block or patience")

    @property
    def exact(self) -> bool:
        """Whether, with an exact denoiser, alone on a canvas, it draws from the denoiser's own distribution.

        That needs one position at a time, chosen without a look at the value that is drawn, and the value drawn as
        predicted. (``ancestral`` and ``halton`` with at least as many steps as positions are exact too; that depends on
        the canvas.) Two plans on one canvas reveal a position each in a pass: together they are not exact.
        """
        as_predicted = self.temperature == 1 and self.temperature_end in (None, 1) and self.top_k is None
        one_by_one = {"entropy": self.gamma == 0, "threshold": self.tau == 1, "confidence": False}.get(self.name, True)
        untouched = self.top_p == 1 and self.remask is None and self.patience is None and self.guidance == 0
        return self.steps is None and as_predicted and one_by_one and untouched

    @property
    def fixed(self) -> bool:
        """Whether the number of passes is known before the first one."""
        return self.name not in ("entropy", "threshold") and self.patience is None

    def capped(self, positions: int) -> int:
        """Forward passes at most for a row of so many positions; less than `steps` if steps are to no avail."""
        if self.remask is not None and self.steps is not None:
            return self.steps if positions else 0
        return positions if self.steps is None else min(self.steps, positions)

    def scale(self, t: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """The guidance scale at noise level t."""
        w = self.guidance * (1 - t if self.guidance_schedule == "linear" else torch.ones_like(t))
        return torch.where(t <= self.guidance_from + 1e-6, w, 0.0)


def _known(what: str, name: str, names: tuple[str, ...]) -> None:
    if name not in names:
        raise ValueError(f"unknown {what} {name!r}: one of {', '.join(names)}")


@dataclass(frozen=True)
class Sampling:
    """How each segment is generated, and in which order a pair is; saved beside a model as `sampling.json`.

    Attributes:
        order: ``together`` walks both segments in the same forward passes, each by its own plan, without guidance.
        refresh: with ``condition_attention: full``, what is given is computed in every so many-th pass only: faster, an
            approximation whose drift is told. 1 is exact. With ``prefix`` it is computed once anyway, exactly.
        weights: how strongly guidance heeds given segments, by name: report, image, a modality, words of a view. Those
            without one share the weight 1. Each name costs a branch more in every guided pass.
        mean: decode an image from the vector that the model expects of each code instead of the code: the estimate of
            least squared error, for translation by PSNR. No sample: soft where the model is not sure.
        spin: of translations: the mean of this many squared, of sources moved by fractions of a code, moved back
            (`medim.spinning`); 1: the source as it lies.
    """

    report: Plan = Plan("ancestral", steps=16)
    image: Plan = Plan("confidence", steps=16, schedule="cosine")
    order: Order = "report-first"
    refresh: int = 1
    weights: dict[str, float | int] = field(default_factory=dict)
    mean: bool = False
    spin: int = 1

    def __post_init__(self) -> None:
        for name, weight in self.weights.items():
            if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
                raise ValueError(f"weights: {name}={weight}: a number from 0 on")
        if self.order not in get_args(Order):
            raise ValueError(f"unknown order {self.order!r}: one of {', '.join(get_args(Order))}")
        if self.refresh < 1:
            raise ValueError(f"refresh={self.refresh}: at least 1, which is exact")
        if not isinstance(self.spin, int) or self.spin < 1:
            raise ValueError(f"spin={self.spin}: a whole number from 1, which moves nothing")
        if not isinstance(self.mean, bool):
            raise ValueError(f"mean={self.mean}: true or false")

    @classmethod
    def read(cls, path: str | Path) -> Sampling:
        """Plans from a YAML or JSON file such as those in configs/sample/; what it leaves out is the default.

        Raises:
            UserError: no such file, an unknown key, a value that no plan takes.
        """
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file of sampling plans; configs/sample/ has some")
        try:
            data: Any = OmegaConf.to_container(OmegaConf.load(path)) or {}
            made = {role: Plan(**data[role]) for role in ("report", "image") if role in data}
            return cls(**{**data, **made})
        except (TypeError, ValueError, YAMLError) as error:
            raise UserError(f"{path}: not sampling plans ({' '.join(str(error).split())})") from error

    def override(
        self,
        plan: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        temperature: float | None = None,
        order: Order | None = None,
        refresh: int | None = None,
    ) -> Sampling:
        """The same with what a user asked for; what belongs to a plan, in both plans.

        Raises:
            UserError: a plan does not take it.
        """
        if plan is not None and plan not in get_args(PlanName):
            raise UserError(f"unknown plan {plan!r}: one of {', '.join(get_args(PlanName))}")
        asked = {"name": plan, "steps": steps, "guidance": guidance, "temperature": temperature}
        changes: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        try:
            report, image = replace(self.report, **changes), replace(self.image, **changes)
            return replace(
                self,
                report=report,
                image=image,
                order=order or self.order,
                refresh=self.refresh if refresh is None else refresh,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def without_guidance(self) -> Sampling:
        """The same for a model that was not trained for guidance."""
        return replace(self, report=replace(self.report, guidance=0.0), image=replace(self.image, guidance=0.0))

    def describe(self, roles: Sequence[str]) -> str:
        """One line that says which plans made these segments, as the manifest has it."""
        plans = {"report": self.report, "image": self.image}
        parts = [f"{role}:{plans[role].name}/{plans[role].steps}" for role in ("report", "image") if role in roles]
        ends = ["mean"] if self.mean and "image" in roles else []
        return " ".join([self.order, *parts, *ends] if len(parts) > 1 else [*parts, *ends])
