"""The metric modules load and compute as `evaluate` users do it, without a network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from medim.errors import UserError
from medim.metrics.text import TEXT_METRICS, figures

EVAL = Path(__file__).parents[2] / "eval" / "metrics"


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory):
    """`evaluate.load` of a module of ours, with caches that vanish."""
    evaluate = pytest.importorskip("evaluate")
    cache = tmp_path_factory.mktemp("evaluate")

    def load_one(name: str) -> Any:
        return evaluate.load(str(EVAL / name), cache_dir=str(cache / "data"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(cache / "modules"))
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.syspath_prepend(str(cache / "modules"))
        yield load_one


def test_bleu(load):
    scores = load("bleu").compute(predictions=["Clear lungs.", ""], references=["clear lungs.", "x"])
    assert scores["bleu-1"] == pytest.approx(0.7165, abs=1e-4)  # exp(1 - 4/3): the empty one is counted


def test_rouge_l(load):
    scores = load("rouge_l").compute(predictions=["heart normal", ""], references=["heart normal", "x"])
    assert scores == {"rouge_l": pytest.approx(0.5)}


def test_coherence(load):
    metric = load("coherence")
    scores = metric.compute(predictions=[[], ["a", "b"]], references=[["b"], ["a", "b"]], findings=["a", "b"])
    assert (scores["precision"], scores["recall"], scores["f1"]) == pytest.approx((1.0, 2 / 3, 0.8))
    assert scores["floor"] == pytest.approx(0.4)  # only b of the second meets b of the first
    with pytest.raises(ValueError, match="not among those given"):
        metric.compute(predictions=[["z"]], references=[["a"]], findings=["a", "b"])


def test_rule_f1(load):
    metric = load("rule_f1")
    texts = {"predictions": ["Small effusion.", ""], "references": ["Possible effusion.", "Cardiomegaly."]}
    assert metric.compute(**texts) == pytest.approx({"rule_f1": 2 / 3, "rule_f1-5": 2 / 3, "rule_f1_example": 0.5})
    assert metric.compute(**texts, doubt=False)["rule_f1"] == 0.0


TEXTS = {"predictions": ["The heart is unchanged.", ""], "references": ["The heart is normal.", "No effusion."]}


OTHERS = sorted(TEXT_METRICS.keys() - {"bleu", "rouge_l", "empty", "meteor"})
SLOW = pytest.param("meteor", marks=pytest.mark.slow)  # its jar takes seconds a call


@pytest.mark.parametrize("name", [*OTHERS, SLOW])
def test_the_others_are_our_functions(load, name: str) -> None:
    metric = load(name)
    texts = TEXTS if TEXT_METRICS[name].needs_reference else {"predictions": TEXTS["predictions"]}
    try:
        wanted = figures(name, *TEXTS.values())
    except UserError as error:  # a package that is not here
        with pytest.raises(UserError, match=r"install|nltk"):
            metric.compute(**texts)
        pytest.skip(str(error))
    assert metric.compute(**texts) == pytest.approx(wanted, nan_ok=True)
