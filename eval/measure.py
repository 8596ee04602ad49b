"""The measuring itself: read findings off images, parse them out of texts, compare sets, draw intervals.

What is compared for coherence: findings read from an image (X-ray: the shipped finding reader; pathology: colour
areas) against findings parsed from a text, where the data are the embedded ones, which can be read so. Beside the
figure stand its floor, which the same texts and images reach when they are paired wrongly, and its ceiling, which real
studies reach: with images that went through the image tokenizer, since that is the best a generated image can be, but
for task ``report`` with the real images that it is given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import PIL.Image
from scipy.stats import spearmanr

from eval.outputs import Output, makes
from eval.protocol import Protocol, TaskName
from eval.studies import clusters_of, patient_of
from medim.data import embedded, pathology
from medim.data.studies import Study
from medim.errors import UserError
from medim.metrics import coherence
from medim.metrics.reader import FindingReader
from medim.metrics.statistics import Sums, interval
from medim.pipeline import ASSETS

Findings = list[dict[str, bool]]
SHOWN = ("value", "n", "low", "high", "higher", "floor", "ceiling", "about")


@functools.cache
def _xray_reader() -> FindingReader:
    return FindingReader.from_pretrained(ASSETS / "reader-xray")


def _measure_pathology(images: Sequence[PIL.Image.Image]) -> Findings:
    return [pathology.findings(_measured(image)) for image in images]


def _measured(image: PIL.Image.Image) -> pathology.Measurement:
    """Of a tile as it is drawn for its size, since the smoothing is in pixels."""
    side = embedded.side_for(min(image.size))
    return pathology.measure(image if image.size == (side, side) else image.resize((side, side)))


READERS: dict[str, Callable[[Sequence[PIL.Image.Image]], Findings]] = {
    "xray": lambda images: _xray_reader().read(images),
    "pathology": _measure_pathology,
}


@dataclass(frozen=True)
class Figure:
    """A figure of a task.

    Attributes:
        sums: what each output adds; None for figures of the whole set, which have no row an output.
        n: outputs that it is over.
        low, high: 95% bootstrap interval, patients drawn; NaN where there is none.
        higher: whether more is better; None where neither is.
        floor, ceiling: what wrong pairing and what real studies reach; NaN where not known.
        about: what is shown beside it.
    """

    value: float
    n: int
    sums: Sums | None = None
    low: float = math.nan
    high: float = math.nan
    higher: bool | None = True
    floor: float = math.nan
    ceiling: float = math.nan
    about: str = ""

    def plain(self) -> dict[str, Any]:
        """For results.json, without what is not known."""
        said = {name: getattr(self, name) for name in SHOWN}
        keep = ("value", "n")
        return {k: v for k, v in said.items() if k in keep or (v not in ("", None) and not _is_nan(v))}


@dataclass(frozen=True)
class Real:
    """The real studies of a domain, and what is read off their images.

    Attributes:
        pictures: as the system that is scored sees them.
        again: after the image tokenizer; the pictures themselves where none is known.
        files: of `pictures`, relative to the output folder, by study.
        sources: of a translation, files of what is given by its name, by study.
        baselines: of a translation, what needs no model: pictures by the name of the baseline, one a study.
        told, seen, seen_again: findings of reports, pictures and `again`; empty where they cannot be read.
    """

    domain: str
    studies: Sequence[Study]
    pictures: Sequence[PIL.Image.Image]
    again: Sequence[PIL.Image.Image]
    told: Findings = field(default_factory=list)
    seen: Findings = field(default_factory=list)
    seen_again: Findings = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    sources: dict[str, dict[str, str]] = field(default_factory=dict)
    baselines: Mapping[str, Sequence[PIL.Image.Image]] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        domain: str,
        studies: Sequence[Study],
        pictures: Sequence[PIL.Image.Image],
        again: Sequence[PIL.Image.Image] | None,
        findings: bool,
    ) -> Real:
        """With findings where they can be read."""
        if not findings:
            return cls(domain, studies, pictures, again or pictures)
        told = [embedded.PARSERS[domain](study.report) for study in studies]
        seen = READERS[domain](pictures)
        return cls(domain, studies, pictures, again or pictures, told, seen, READERS[domain](again) if again else seen)


@dataclass
class Scoring:
    """What the figures of every task share, and what could not be measured."""

    protocol: Protocol
    seed: int = 0
    missing: dict[str, str] = field(default_factory=dict)

    def figure(self, sums: Sums | float, outputs: Sequence[Output], **known: Any) -> Figure:
        """With its interval if it has rows."""
        if isinstance(sums, float | int):
            return Figure(float(sums), len(outputs), **known)
        low, high = interval(
            sums, clusters_of([output.study for output in outputs]), self.seed, self.protocol.bootstrap
        )
        return Figure(sums.value, len(outputs), sums, low, high, **known)

    def attempt(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Its figures; none, and a note, where a package or weights are missing."""
        if name in self.missing:
            return {}
        try:
            return measure()
        except UserError as error:
            self.missing[name] = str(error)
            return {}


def score(scoring: Scoring, task: TaskName, outputs: Sequence[Output], real: Real) -> dict[str, Any]:
    """All figures and rows of one task; under ``sums`` the rows of the figures, for paired tests."""
    figures: dict[str, Figure] = {}
    failures = [float(bool(output.failed)) for output in outputs]
    figures["failed"] = scoring.figure(Sums.mean(failures), outputs, higher=False)
    findings = _findings(scoring, task, outputs, real, figures) if real.told else None
    if makes(task)[1]:
        figures |= _text(scoring, task, outputs, findings[1] if findings else None, real)
    if makes(task)[0] and (scoring.protocol.image or task == "translate"):
        from eval.images import image_figures

        figures |= image_figures(scoring, task, outputs, real)
    if task != "translate":
        figures |= _pairing(scoring, outputs, task, real)
    rows = [_row(number, output, findings, figures) for number, output in enumerate(outputs)]
    shares = _prevalence(task, findings, real, figures) if findings else {}
    return {
        "figures": {name: figure.plain() for name, figure in figures.items()},
        "findings": _by_finding(findings[2:], shares) if findings else {},
        "failed": int(sum(failures)),
        "rows": rows,
        "sums": {name: figure.sums for name, figure in figures.items() if figure.sums is not None},
    }


def _row(number: int, output: Output, findings: tuple[Findings, ...] | None, figures: Mapping[str, Figure]) -> dict:
    row: dict[str, Any] = {
        "id": output.id,
        "study": output.study.id,
        "patient": patient_of(output.study),
        "seed": output.seed,
        "number": number,
        "image": str(output.image) if output.image else None,
        "report": output.report,
        "real_report": output.study.report,
        "failed": output.failed,
        **output.stats,
    }
    if findings:
        seen, told = findings[0][number], findings[1][number]
        row |= {"seen": [n for n, yes in seen.items() if yes], "told": [n for n, yes in told.items() if yes]}
    return row


# ---------------------------------------------------------------------------------------------------------- coherence


def _findings(
    scoring: Scoring, task: TaskName, outputs: Sequence[Output], real: Real, figures: dict[str, Figure]
) -> tuple[Findings, Findings, Findings, Findings]:
    """Findings seen and told of each output, then those predicted and those they are held against; adds the figure."""
    place = {study.id: number for number, study in enumerate(real.studies)}
    index = [place[output.study.id] for output in outputs]
    parse, nothing = embedded.PARSERS[real.domain], dict.fromkeys(real.told[0], False)
    told = [parse(o.report) if o.report.strip() else nothing for o in outputs] if makes(task)[1] else []
    told = told or [real.told[i] for i in index]
    seen = _seen(outputs, real.domain, nothing) if makes(task)[0] else [real.seen[i] for i in index]
    predicted, reference = (told, seen) if task == "report" else (seen, told)
    if task == "pair":  # of a pair of which nothing is left, the real findings are missed: nothing agrees with nothing
        lost = [o.image is None and not o.report.strip() for o in outputs]
        reference = [real.told[i] if gone else one for i, gone, one in zip(index, lost, reference, strict=True)]
    top = real.seen if task == "report" else real.seen_again
    figures["coherence"] = scoring.figure(
        coherence.sums(predicted, reference),
        outputs,
        floor=coherence.shuffled_floor(predicted, reference),
        ceiling=coherence.micro(top, real.told).f1,
        about="micro-F1 of findings, image against text",
    )
    macro = coherence.macro(predicted, reference)
    figures["coherence_macro"] = Figure(macro.f1, len(outputs))
    if any(name.startswith(coherence.SIDES) for name in nothing):
        either = [coherence.sideless(one) for one in (predicted, reference, top, real.told)]
        figures["coherence_sideless"] = scoring.figure(
            coherence.sums(*either[:2]),
            outputs,
            floor=coherence.shuffled_floor(*either[:2]),
            ceiling=coherence.micro(*either[2:]).f1,
            about="the same, findings on either side counted alike",
        )
        sides = coherence.side_accuracy(predicted, reference)
        about = f"same side, of {sides.rows[:, 1].sum():.0f} findings that image and text have on one side each"
        best = coherence.side_accuracy(top, real.told).value
        figures["side_accuracy"] = scoring.figure(sides, outputs, floor=0.5, ceiling=best, about=about)
    if real.domain == "pathology":
        pictures = [o.picture() if makes(task)[0] else real.pictures[i] for o, i in zip(outputs, index, strict=True)]
        best = cellularity_rho(real.told, real.pictures if task == "report" else real.again)[0]
        rho, n = cellularity_rho(told, pictures)
        about = "Spearman's rank correlation of the nuclear area told and measured"
        figures["cellularity_rho"] = Figure(rho, n, floor=0.0, ceiling=best, about=about)
    return seen, told, predicted, reference


def cellularity_rho(told: Findings, pictures: Sequence[PIL.Image.Image | None]) -> tuple[float, int]:
    """Spearman's rank correlation between the band of cellularity that is told and the measured share of nuclei, and of
    how many: those with a picture and one band."""
    bands = pathology.FINDINGS[:3]
    pairs = [
        ([one[band] for band in bands].index(True), _measured(picture).nuclei)
        for one, picture in zip(told, pictures, strict=True)
        if picture is not None and sum(one[band] for band in bands) == 1
    ]
    if len({band for band, _ in pairs}) < 2 or len({share for _, share in pairs}) < 2:
        return math.nan, len(pairs)
    return float(spearmanr(*zip(*pairs, strict=True)).statistic), len(pairs)


def _seen(outputs: Sequence[Output], domain: str, nothing: dict[str, bool]) -> Findings:
    """Findings of generated images; none of an image that is not there."""
    pictures = {number: picture for number, o in enumerate(outputs) if (picture := o.picture()) is not None}
    read = dict(zip(pictures, READERS[domain](list(pictures.values())) if pictures else [], strict=True))
    return [read.get(number, nothing) for number in range(len(outputs))]


def _prevalence(
    task: TaskName, findings: tuple[Findings, ...], real: Real, figures: dict[str, Figure]
) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Of each side that was generated, how often it and the data have each finding; adds a figure a side."""
    sides = {"drawn": (makes(task)[0], findings[0], real.seen_again), "told": (makes(task)[1], findings[1], real.told)}
    shares = {}
    for side, (made, ours, data) in sides.items():
        if made:
            shares[side] = coherence.prevalence(ours), coherence.prevalence(data)
            about = f"share of studies that has a finding, {side}, against the data's: mean difference over findings"
            gap = coherence.prevalence_gap(ours, data)
            best = coherence.chance_gap(data, len(ours)) if task == "pair" else 0.0  # else of the very same studies
            figures[f"prevalence_gap/{side}"] = Figure(gap, len(ours), higher=False, ceiling=best, about=about)
    return shares


def _by_finding(
    pair: Sequence[Findings], shares: Mapping[str, tuple[dict[str, float], dict[str, float]]]
) -> dict[str, Any]:
    """Scores, and the shares of outputs and of real studies that have the finding, by side."""
    return {
        name: asdict(one) | {"prevalence": {side: [ours[name], data[name]] for side, (ours, data) in shares.items()}}
        for name, one in coherence.per_finding(*pair).items()
    }


# --------------------------------------------------------------------------------------------------------------- pairs


def _pairing(scoring: Scoring, outputs: Sequence[Output], task: TaskName, real: Real) -> dict[str, Figure]:
    """Whether image and report of an output belong together, by models that run here (`eval.encoders`)."""
    place = {study.id: number for number, study in enumerate(real.studies)}
    figures: dict[str, Figure] = {}
    if not scoring.protocol.encoder and not scoring.protocol.judge:
        return figures
    shown = [(o.picture() if makes(task)[0] else real.pictures[place[o.study.id]]) for o in outputs]
    told = [o.report if makes(task)[1] else o.study.report for o in outputs]
    both = [number for number, picture in enumerate(shown) if picture is not None]
    pictures, reports = [picture for picture in shown if picture is not None], [told[number] for number in both]
    some = [outputs[number] for number in both]

    def retrieve() -> dict[str, Figure]:
        from eval.encoders import load_encoder
        from medim.metrics.retrieval import retrieval

        found = retrieval(*load_encoder(scoring.protocol.encoder)(pictures, reports))
        return {name: scoring.figure(value, some, higher="recall" in name) for name, value in found.items()}

    def judge() -> dict[str, Figure]:
        from eval.encoders import load_judge

        rate = load_judge(scoring.protocol.judge)
        said = [rate(picture, report) for picture, report in zip(pictures, reports, strict=True)]
        values = [math.nan if one is None else one for one in said]
        about = f"1 to 5 by {scoring.protocol.judge}; {said.count(None)} answers without a digit are left out"
        return {"judge": scoring.figure(Sums.mean(values), some, about=about)}

    if scoring.protocol.encoder:
        figures |= scoring.attempt("retrieval", retrieve)
    if scoring.protocol.judge:
        figures |= scoring.attempt("judge", judge)
    return figures


# --------------------------------------------------------------------------------------------------------------- text


def _text(
    scoring: Scoring, task: TaskName, outputs: Sequence[Output], told: Findings | None, real: Real
) -> dict[str, Figure]:
    """Metrics of generated reports; only task ``report`` has a real one to be held against."""
    figures: dict[str, Figure] = {}
    for name in scoring.protocol.text:
        figures |= scoring.attempt(name, functools.partial(_text_metric, scoring, name, task, outputs))
    if task == "report" and told is not None:
        place = {study.id: number for number, study in enumerate(real.studies)}
        wanted = [real.told[place[o.study.id]] for o in outputs]
        figures["findings_f1"] = scoring.figure(coherence.sums(told, wanted), outputs, about="report against report")
    return figures


def _text_metric(scoring: Scoring, name: str, task: TaskName, outputs: Sequence[Output]) -> dict[str, Figure]:
    from medim.metrics.clinical import CLINICAL
    from medim.metrics.findings import rule_f1
    from medim.metrics.text import TEXT_METRICS

    reports, references = [o.report for o in outputs], [o.study.report for o in outputs]
    if name == "rule_f1":
        found: Mapping[str, Sums | float] = rule_f1(reports, references) if task == "report" else {}
        return {key: scoring.figure(value, outputs) for key, value in found.items()}
    if name in CLINICAL:
        found = CLINICAL[name].compute(reports, references) if task == "report" else {}
        higher: bool | None = CLINICAL[name].higher_is_better
    elif name in TEXT_METRICS:
        metric = TEXT_METRICS[name]
        found = metric.compute(reports, references) if task == "report" or not metric.needs_reference else {}
        higher = metric.higher_is_better
    else:
        raise UserError(f"text: unknown metric {name!r}: one of {', '.join([*TEXT_METRICS, 'rule_f1', *CLINICAL])}")
    return {key: scoring.figure(value, outputs, higher=higher) for key, value in found.items()}


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
