"""What an evaluation does: the options of a protocol file such as `eval/demo.yaml`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from medim.config import options

Domain = Literal["xray", "pathology"]
TaskName = Literal["pair", "report", "image"]
Metric = Literal["bleu", "rouge_l", "distinct"]
Positive = Annotated[int, Field(ge=1)]


@options
class Likelihood:
    """Bits per token on validation studies; `studies: 0` leaves it out."""

    studies: Annotated[int, Field(ge=0, le=10_000)] = 24  # a domain
    n_times: Annotated[int, Field(ge=2)] = 8  # noise levels a study


@options
class Protocol:
    """Coherence is always measured; `metrics` names what is measured on the text besides.

    Attributes:
        split: which studies give the images and reports to start from.
        studies: studies a domain, and so samples a domain and task.
        seed: of sampling, of likelihoods and of the bootstrap; the studies are those of seed 0 whatever it is.
        bootstrap: resamples of the intervals.
    """

    domains: tuple[Domain, ...] = ("xray", "pathology")
    split: Literal["test", "validation"] = "test"
    studies: Annotated[int, Field(ge=1, le=10_000)] = 48
    tasks: tuple[TaskName, ...] = ("pair", "report", "image")
    metrics: tuple[Metric, ...] = ("bleu", "rouge_l", "distinct")
    likelihood: Likelihood = Likelihood()
    seed: Annotated[int, Field(ge=0)] = 0
    bootstrap: Positive = 1000
