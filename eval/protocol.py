"""What an evaluation does: the options of a protocol file such as `eval/demo.yaml`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from medim.config import options
from medim.data.reports import ReportOptions

TaskName = Literal["pair", "report", "image", "translate"]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@options
class DataOptions:
    """Where the real studies come from.

    Attributes:
        source: a reader of `medim prepare`: demo, mimic-cxr, pathgen, folder, manifest, ...
        root: what it reads; on the command line: data.root=DIR. A file .jsonl is read as a manifest in any case.
        options: of the reader, as `medim prepare SOURCE --help` has them.
        reports: how real reports are prepared.
    """

    source: str = "demo"
    root: str = ""
    options: dict[str, Any] | None = None
    reports: ReportOptions = ReportOptions()


@options
class Likelihood:
    """Bits per token on validation studies; `studies: 0` leaves it out."""

    studies: Annotated[int, Field(ge=0, le=10_000)] = 24  # a domain
    n_times: Annotated[int, Field(ge=2)] = 8  # noise levels a study


@options
class Rank:
    """How often the model's own likelihood finds the study's report among others; `studies: 0` leaves it out."""

    studies: Count = 0  # a domain
    candidates: Annotated[int, Field(ge=2)] = 4  # the right one among them
    n_times: Annotated[int, Field(ge=1)] = 8


@options
class Memorisation:
    """How near generated images come to training images; `studies: 0` leaves it out."""

    studies: Count = 0  # training images a domain
    extractor: str = "vq"
    quantile: Annotated[float, Field(gt=0, lt=1)] = 0.01  # of held-out distances: below it, an image counts as a copy


@options
class Downstream:
    """A report generator trained on real studies, and one on the same and synthetic ones: `eval.downstream`.

    Attributes:
        real, synthetic: studies a domain; `real: 0` takes all of the split train.
        train: the config of both.
        overrides: of it, as on train.py's command line.
    """

    synthetic: Positive
    train: str
    real: Count = 0
    overrides: tuple[str, ...] = ()


@options
class Published:
    """What another system is said to reach, shown beside ours.

    Attributes:
        figures: by the names of results.json where the metric is the same, else by the paper's own.
        source: paper and table.
    """

    system: str
    figures: dict[str, float]
    source: str
    n: int | None = None
    note: str = ""


@options
class Protocol:
    """One benchmark.

    Attributes:
        split: which studies give the images and reports to start from.
        studies: studies a domain, and so samples a domain, task and seed; 0 takes all of the split.
        translate: task `translate`: names of the given images, such as t1 or "ct soft", and last of the wanted one.
            Studies that lack one of them are left out.
        text: metrics of reports, names of `medim.metrics.text.TEXT_METRICS`, rule_f1, or those of
            `medim.metrics.clinical`.
        image: metrics of sets of images: fid, kid, prdc, ms_ssim, inception_score.
        extractors: whose features they compare.
        encoder: an image-text model of HuggingFace for retrieval, a name or a folder; empty leaves it out.
        judge: a local vision-language model that rates pairs; empty leaves it out.
        sampling: a file as those of configs/sample/; empty: as the model recommends.
        seeds: of sampling; figures pool them.
        bootstrap: resamples of the intervals.
    """

    data: DataOptions = DataOptions()
    domains: tuple[str, ...] = ("xray", "pathology")
    split: Literal["train", "test", "validation"] = "test"
    studies: Annotated[int, Field(ge=0, le=1_000_000)] = 48
    tasks: tuple[TaskName, ...] = ("pair", "report", "image")
    translate: tuple[str, ...] = ()
    text: tuple[str, ...] = ("bleu", "rouge_l", "distinct", "repetition", "length_ratio", "invented_prior")
    image: tuple[str, ...] = ("fid", "kid", "prdc", "ms_ssim")
    extractors: tuple[str, ...] = ("vq",)
    encoder: str = ""
    judge: str = ""
    sampling: str = ""
    likelihood: Likelihood = Likelihood()
    rank: Rank = Rank()
    memorisation: Memorisation = Memorisation()
    downstream: Downstream | None = None
    seeds: tuple[Count, ...] = (0,)
    bootstrap: Positive = 1000
    published: tuple[Published, ...] = ()
