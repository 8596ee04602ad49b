"""Likelihoods and fits: what their noise depends on, what they are for models whose answer is known, mistakes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from medim.data import embedded
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.likelihood import REPORT_SHARE, mean_and_error
from medim.pipeline import MeDiM

SHORT, LONG = "No effusion.", "Focal opacity in the right upper zone. Large left pneumothorax. No pleural effusion."


@pytest.fixture
def model(tiny_model: Path) -> Iterator[MeDiM]:
    """Random weights, said to know what a missing condition is."""
    loaded = MeDiM.from_pretrained(tiny_model)
    loaded.model.config.condition_dropout = 0.1
    yield loaded


def picture(index: int = 0) -> Image:
    return embedded.DOMAINS["xray"](0, index, "test").images[0]


def study(name: str = "a", report: str = SHORT, image: int = 0) -> Study:
    return Study(name, name, (picture(image),), report)


def flat(results: Any) -> list[float]:
    """All numbers of NLLs or Fits, in order."""
    if hasattr(results[0], "total"):
        return [v for r in results for v in (*r.bits.values(), *r.standard_error.values(), r.total, r.total_error)]
    return [v for r in results for v in (r.bits, r.standard_error)]


@pytest.mark.parametrize("what", ["nll", "fit"])
def test_neither_batch_nor_padding_nor_neighbours_change_a_score(model: MeDiM, what: str) -> None:
    """Slots of 16 and 32 ids stand beside each other; alone, a study has no padding."""
    studies = [study("a", SHORT, 0), study("b", LONG, 1), study("c", SHORT, 2)]
    assert len(model.joint.report_ids(SHORT)) < len(model.joint.report_ids(LONG))
    score = getattr(model, what)
    wanted = flat(score(studies, n_times=3, batch_size=1))
    assert flat(score(studies, n_times=3, batch_size=16)) == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    assert flat(score(studies[::-1], n_times=3, batch_size=2)[::-1]) == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    third = len(wanted) // 3
    assert flat(score(studies[1:2], n_times=3)) == pytest.approx(wanted[third : 2 * third], rel=1e-4, abs=1e-3)


def test_noise_is_the_ids_and_the_seeds(model: MeDiM) -> None:
    one, same, other = model.nll([study("a"), study("a"), study("b")], n_times=3)
    assert one == same and abs(one.total - other.total) > 1e-3
    assert model.nll([study("a")], n_times=3, seed=1)[0].total != pytest.approx(one.total, rel=1e-5)


def test_the_bound_of_both_is_one_sum(model: MeDiM) -> None:
    (it,) = model.nll([study("a", LONG)], n_times=5)
    assert it.total == pytest.approx(sum(it.bits.values()), rel=1e-5)
    assert it.tokens == {"text": 32, "image": 36} and it.total_error > 0


def test_a_model_that_ignores_its_input_finds_that_nothing_fits(model: MeDiM) -> None:
    """Uniform whatever it sees: no part tells of the other, and with common masks the difference is zero exactly."""
    model.model.output_weight.data.zero_()
    for direction in ("both", "report", "image"):
        for it in model.fit([study("a"), study("b", LONG, 1)], direction=direction, n_times=3):
            assert abs(it.bits) < 1e-4 and it.standard_error < 1e-4


def test_a_fit_is_a_difference_of_two_bounds(model: MeDiM) -> None:
    """The given part of the fit is the conditional bound of `nll`, by the same masks."""
    asked = study("a", LONG, 1)
    fits = {d: model.fit([asked], direction=d, n_times=4)[0].bits for d in ("both", "report", "image")}
    assert fits["both"] == pytest.approx(REPORT_SHARE * fits["report"] + (1 - REPORT_SHARE) * fits["image"], abs=1e-3)
    given = model.nll([asked], roles=("report",), n_times=4)[0].total
    asked_of: list[torch.Tensor] = []
    scorer = model._scorer(4, 0, 16, None)
    ask = scorer._ask
    scorer._ask = lambda queries: asked_of.extend(t := ask(queries)) or t
    scorer.fit([asked], "report")
    alone, conditional = (float(terms.sum(1).mean()) / math.log(2) for terms in asked_of)
    assert conditional == pytest.approx(given, rel=1e-5) and alone - conditional == pytest.approx(
        fits["report"], abs=1e-3
    )


def test_a_part_left_out_is_not_looked_at(model: MeDiM) -> None:
    """Alone, a report's bound is the same whatever image stands there; given the image it is not."""
    scorer = model._scorer(3, 0, 16, None)
    codes: dict[tuple[int, str], list[int]] = {}
    queries = [query for image in (0, 1) for query in scorer._four(study("a", LONG, image), ("report",), codes)]
    first, given_first, second, given_second = scorer._ask(queries)
    assert torch.equal(first, second) and not torch.allclose(given_first, given_second)


def test_ranking_puts_the_greatest_fit_first(model: MeDiM) -> None:
    reports = [SHORT, LONG, "Mild cardiomegaly. The lungs are clear."]
    pixels = picture().pixels
    ranking = model.rank(pixels, reports, domain="xray", id="a", n_times=4)
    bits = [fit.bits for fit in ranking.fits]
    alone = model.fit([study("a", report) for report in reports], n_times=4)
    assert bits == pytest.approx([fit.bits for fit in alone], abs=1e-3)  # comparing changes no score
    assert ranking.best == bits.index(max(bits))
    assert ranking.margin == pytest.approx(max(bits) - sorted(bits)[-2], abs=1e-4) and ranking.margin_error > 0
    turned = model.rank(pixels, reports[::-1], id="a", n_times=4, batch_size=1)
    assert turned.best == 2 - ranking.best and turned.margin == pytest.approx(ranking.margin, abs=1e-3)
    twice = model.rank(pixels, [LONG, LONG], id="a", n_times=4)
    assert twice.best == 0 and twice.margin == twice.margin_error == 0  # common masks: equal reports are equal


def test_progress_counts_studies(model: MeDiM) -> None:
    told: list[int] = []
    studies = [study(name) for name in "abc"]
    model.nll(studies, n_times=1, batch_size=2, progress=told.append)
    model.fit(studies, n_times=1, batch_size=4, progress=told.append)
    assert told == [2, 1, 1, 1, 1]


def test_the_error_of_strata_is_of_neighbours() -> None:
    mean, error = mean_and_error(torch.tensor([1.0, 3.0, 2.0]))
    assert mean == 2 and error == pytest.approx(math.sqrt((4 + 1) / (2 * 3 * 2)))
    assert math.isnan(mean_and_error(torch.tensor([1.0]))[1])
    draws = (
        torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) + 100
    )  # no trend: that of independent draws
    errors = torch.tensor([mean_and_error(row)[1] for row in draws])
    assert float(errors.square().mean()) == pytest.approx(1 / 8, rel=0.05)


ICON = PIL.Image.new("L", (96, 96))
MISTAKES: dict[str, tuple[list[Study], str]] = {
    "none": ([], "no studies to score"),
    "no image": ([replace(study(), images=())], "study a: has 0 images: one is needed"),
    "empty report": ([study(), study("b", "  ")], "study b: the report is empty"),
    "domain": ([replace(study(), images=(Image("ct", ICON),))], r"study a: unknown domain 'ct': .* knows xray, path"),
    "file": ([replace(study(), images=(Image("xray", Path("no/x.png")),))], r"study a: image no/x\.png: no such file"),
    "too long": ([study("a", LONG * 4)], r"study a: the report has \d+ tokens, .* takes 47: shorten it"),
}


@pytest.mark.parametrize(("studies", "words"), MISTAKES.values(), ids=list(MISTAKES))
@pytest.mark.parametrize("what", ["nll", "fit", "check"])
def test_mistakes_are_one_line(model: MeDiM, what: str, studies: list[Study], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        getattr(model, what)(studies)
    assert "\n" not in str(told.value)


def test_what_cannot_be_asked(model: MeDiM) -> None:
    with pytest.raises(UserError, match="study image: 1 report to rank: give at least 2"):
        model.rank(ICON, [SHORT])
    with pytest.raises(UserError, match="unknown direction 'up': one of both, report, image"):
        model._scorer(1, 0, 1, None).fit([study()], "up")
    with pytest.raises(UserError, match="n_times 0: give at least 1"):
        model.nll([study()], n_times=0)
    with pytest.raises(UserError, match="batch size 0: give at least 1"):
        model.fit([study()], batch_size=0)
    with pytest.raises(ValueError, match="one or both of"):
        model.nll([study()], roles=("prompt",))
    model.model.config.condition_dropout = 0.0
    with pytest.raises(UserError, match="trained without condition dropout: it cannot tell"):
        model.fit([study()])


def test_what_is_given_may_be_kept(model: MeDiM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under condition_attention: prefix the kept keys and values change no score."""
    monkeypatch.setattr(model.model.config, "condition_attention", "prefix")
    asked = [study("a", LONG, 1), study("b", "Clear lungs.", 2)]
    kept = [one.bits for one in model.fit(asked, n_times=3)], [one.total for one in model.nll(asked, n_times=3)]
    whole, keeping = type(model.model).denoiser, []

    def every(network: Any, canvas: Any, generate: Any, **options: Any) -> Any:
        keeping.append(1)
        return whole(network, canvas, generate, cache=False)

    monkeypatch.setattr(type(model.model), "denoiser", every)
    again = [one.bits for one in model.fit(asked, n_times=3)], [one.total for one in model.nll(asked, n_times=3)]
    assert keeping and kept[0] == pytest.approx(again[0], abs=1e-3) and kept[1] == pytest.approx(again[1], rel=1e-5)
