"""Clinical metrics of reports by the models that others publish, where they are installed. `CLINICAL` lists them.

All four come from RadEval 2.2.1 (Xu et al. 2025, arXiv 2509.18030; MIT), which runs on transformers 5. The package of
each alone does not: f1chexbert 0.0.2 gives huggingface_hub an argument that it has no longer, radgraph 0.1.18 calls
methods of tokenizers that transformers 5 has removed, green-score 0.0.12 wants Python 3.12.1 and no other.

An output or a reference without words is never given to a model: the pair scores zero.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from medim.errors import UserError
from medim.metrics.statistics import Sums

INSTALL = "pip install radeval==2.2.1"
SHORTEST = 3  # letters: RaTEScore drops shorter sentences, and then counts wrongly


@dataclass(frozen=True)
class ClinicalMetric:
    """A metric that needs a package and weights.

    Attributes:
        shown: its name in tables.
        install: the line that installs the package.
        downloads: what the package fetches when it first runs.
        higher_is_better: of each figure.
        compute: hypotheses and references to figures by name. Raises UserError where the package or its weights are
            missing, ValueError where the lists are empty or of different lengths.
    """

    shown: str
    install: str
    downloads: str
    higher_is_better: bool
    compute: Callable[[Sequence[str], Sequence[str]], dict[str, Sums]]


def chexbert(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Micro-F1 of CheXbert's labels (Smit et al., EMNLP 2020), uncertain ones as positive, as f1chexbert has it.

    Returns:
        "chexbert_f1": over all 14 labels, "No Finding" among them; "chexbert_f1-5": over the five of the CheXpert
        competition. Rows are true positives, false positives, false negatives.
    """
    _check(hypotheses, references)
    scorer = _load("chexbert", "radeval.metrics.f1chexbert.f1chexbert", "F1CheXbert", device=_device())
    names = [*scorer.CONDITION_NAMES, scorer.NO_FINDING]
    guess, truth = (_labels(scorer, texts, len(names)) for texts in (hypotheses, references))
    counts = np.stack([guess & truth, guess & ~truth, ~guess & truth], axis=-1).astype(float)  # [N, labels, 3]
    five = np.isin(names, scorer.TOP5)
    return {"chexbert_f1": Sums(counts.sum(1), "f1"), "chexbert_f1-5": Sums(counts[:, five].sum(1), "f1")}


def radgraph(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Mean RadGraph F1 (Delbrouck et al., EMNLP Findings 2022) with RadGraph-XL (Delbrouck et al., ACL Findings 2024).

    Returns:
        "radgraph_f1": of the reward "partial": entities, their labels, and whether they have a relation.
    """
    _check(hypotheses, references)
    if "RadEval" not in sys.modules:  # as radeval 2.2.1 calls itself in its copy of radgraph
        try:
            sys.modules["RadEval"] = import_module("radeval")
        except ImportError as error:
            raise _missing("radgraph", error) from error
    scorer = _load(
        "radgraph", "radeval.metrics.radgraph", "F1RadGraph", reward_level="partial", model_type="radgraph-xl"
    )
    return {"radgraph_f1": _mean(hypotheses, references, lambda made, told: scorer(refs=told, hyps=made)[1])}


def ratescore(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Mean RaTEScore (Zhao et al., EMNLP 2024). A pair of which one side names no entity scores 0.5: theirs, kept.

    Returns:
        "ratescore".
    """
    _check(hypotheses, references)
    scorer = _load("ratescore", "radeval.metrics.RaTEScore", "RaTEScore", use_gpu=torch.cuda.is_available())

    def score(made: list[str], told: list[str]) -> list[float]:
        # one pair a call: a report in which it sees no sentence would shift those after it
        pairs = (scorer.compute_score([one], [other])[0] for one, other in zip(made, told, strict=True))
        return [float(found[0]) if found else 0.0 for found in pairs]

    return {"ratescore": _mean(hypotheses, references, score)}


def green(hypotheses: Sequence[str], references: Sequence[str]) -> dict[str, Sums]:
    """Mean GREEN (Ostmeier et al., EMNLP Findings 2024): a language model of 7 B counts errors and matches.

    Returns:
        "green"; a pair of which the model's answer cannot be read is left out.
    """
    _check(hypotheses, references)
    cpu = not torch.cuda.is_available()
    scorer = _load(
        "green", "radeval.metrics.green_score", "GREEN", "StanfordAIMI/GREEN-radllama2-7b", cpu=cpu, num_gpus=1
    )
    return {"green": _mean(hypotheses, references, lambda made, told: scorer(refs=told, hyps=made)[2])}


CLINICAL: dict[str, ClinicalMetric] = {
    "chexbert": ClinicalMetric(
        "CheXbert F1", INSTALL, "chexbert.pth of StanfordAIMI/RRG_scorers, the tokenizer of bert-base-uncased",
        True, chexbert,
    ),
    "radgraph": ClinicalMetric(
        "RadGraph F1 (RadGraph-XL, partial)", INSTALL,
        "radgraph-xl.tar.gz of StanfordAIMI/RRG_scorers and the language model that it names", True, radgraph,
    ),
    "ratescore": ClinicalMetric(
        "RaTEScore", INSTALL, "Angelakeke/RaTE-NER-Deberta and FremyCompany/BioLORD-2023-C", True, ratescore
    ),
    "green": ClinicalMetric("GREEN", INSTALL, "StanfordAIMI/GREEN-radllama2-7b", True, green),
}  # fmt: skip


def _check(hypotheses: Sequence[str], references: Sequence[str]) -> None:
    if not hypotheses or len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses and {len(references)} references: give as many, one at least")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _load(name: str, module: str, attribute: str, *args: object, **options: object) -> Any:
    """The package's scorer, with its weights.

    Raises:
        UserError: the package or its weights are missing.
    """
    metric = CLINICAL[name]
    try:
        build = getattr(import_module(module), attribute)
    except ImportError as error:
        raise _missing(name, error) from error
    try:
        return build(*args, **options)
    except Exception as error:  # whatever a hub, an archive or a device may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{metric.shown}: {metric.downloads} could not be loaded from huggingface.co or its cache: {reason}"
        ) from error


def _missing(name: str, error: ImportError) -> UserError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return UserError(f"{CLINICAL[name].shown} is not installed ({reason}): {CLINICAL[name].install}")


def _labels(scorer: Any, texts: Sequence[str], width: int) -> np.ndarray:
    """[N, labels]; a text without words has none."""
    found = np.zeros((len(texts), width), dtype=bool)
    kept = [index for index, text in enumerate(texts) if _says(text)]
    if kept:
        found[kept] = np.array(scorer.get_labels([texts[index] for index in kept]), dtype=bool)
    return found


def _mean(
    hypotheses: Sequence[str],
    references: Sequence[str],
    score: Callable[[list[str], list[str]], Sequence[float | None]],
) -> Sums:
    """Of each pair's score; zero without asking where a side has no words."""
    values = [0.0] * len(hypotheses)
    kept = [i for i, pair in enumerate(zip(hypotheses, references, strict=True)) if all(map(_says, pair))]
    if kept:
        found = score([hypotheses[i] for i in kept], [references[i] for i in kept])
        for index, value in zip(kept, found, strict=True):
            values[index] = float("nan") if value is None else float(value)
    return Sums.mean(values)


def _says(text: str) -> bool:
    return sum(letter.isalpha() for letter in text) >= SHORTEST
