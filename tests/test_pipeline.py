"""The pipeline on a saved folder: all tasks, results that do not depend on the batch, likelihoods, mistakes."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
from safetensors.torch import load_file, save_file

from medim.data import embedded
from medim.data.studies import Image
from medim.errors import UserError
from medim.pipeline import NLL, MeDiM, Request, Sample, resolve
from medim.sampling import Plan, Sampling

REPORT = "The heart is normal in size. No pleural effusion."
GUIDED = Sampling(
    report=Plan("ancestral", steps=20, guidance=0.5),
    image=Plan("confidence", steps=4, schedule="cosine", guidance=1.0),
)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> MeDiM:
    model = MeDiM.from_pretrained(tiny_model)
    model.model.config.condition_dropout = 0.1  # as if it had been trained for guidance
    return model


@pytest.fixture(scope="module")
def xray() -> PIL.Image.Image:
    pixels = embedded.DOMAINS["xray"](0, 0, "test").images[0].pixels
    assert isinstance(pixels, PIL.Image.Image)
    return pixels


def given(task: str, xray: PIL.Image.Image) -> dict[str, Any]:
    return {"pair": {}, "report": {"image": xray}, "image": {"report": REPORT}}[task]


def essence(samples: list[Sample]) -> list[tuple[str, str, list[int], bytes]]:
    return [(s.id, s.report, s.codes.flatten().tolist(), s.image.tobytes()) for s in samples]


@pytest.mark.parametrize("domain", ["xray", "pathology"])
@pytest.mark.parametrize("task", ["pair", "report", "image"])
def test_every_task_makes_whole_studies(model: MeDiM, xray: PIL.Image.Image, task: Any, domain: str) -> None:
    samples = model.sample(task=task, domain=domain, n=3, seed=1, **given(task, xray))
    assert [s.id for s in samples] == [f"{domain}-{task}-{i:05d}" for i in range(3)]
    for it in samples:
        assert (it.task, it.domain) == (task, domain)
        assert it.codes.shape == (6, 6) and 0 <= it.codes.min() <= it.codes.max() < 16
        assert it.image.size == (96, 96) and it.image.mode == ("L" if domain == "xray" else "RGB")
        assert 0 < it.stats["forward_passes"] <= 16 * (2 if task == "pair" else 1) and it.stats["guidance"] == 0
        assert it.given == {"pair": None, "report": "image", "image": "report"}[task]
    if task == "report":
        codes = model.joint.image_codes(Image(domain, xray)).numpy()
        assert all((it.codes == codes).all() for it in samples)
        assert len({it.report for it in samples}) > 1
    if task == "image":
        assert {it.report for it in samples} == {REPORT} and len({it.codes.tobytes() for it in samples}) == 3


@pytest.mark.parametrize("sampling", [None, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("task", ["pair", "report", "image"])
def test_the_batch_size_changes_nothing(model: MeDiM, xray: PIL.Image.Image, task: Any, sampling: Any) -> None:
    """Slots of 16, 32 and 48 ids stand beside each other: padding, and rows with more positions than steps."""
    runs = [
        essence(model.sample(task=task, n=4, seed=3, batch_size=size, sampling=sampling, **given(task, xray)))
        for size in (1, 3)
    ]
    assert runs[0] == runs[1]


def test_orders_of_a_pair(model: MeDiM) -> None:
    orders: tuple[Any, ...] = ("report-first", "image-first", "together")
    made = {order: model.sample(n=2, seed=5, sampling=Sampling(order=order)) for order in orders}
    assert len({tuple(s.report for s in samples) for samples in made.values()}) == 3
    assert made["together"][0].stats["forward_passes"] <= 16 < made["image-first"][0].stats["forward_passes"]


def test_the_same_seed_is_the_same_sample(model: MeDiM, tiny_model: Path) -> None:
    first = essence(model.sample(n=2, seed=7))
    assert first == essence(MeDiM.from_pretrained(tiny_model).sample(n=2, seed=7))
    assert first != essence(model.sample(n=2, seed=8)) and first[0][1:] != first[1][1:]


def test_a_saved_folder_comes_back(model: MeDiM, tmp_path: Path) -> None:
    model.sampling = GUIDED
    try:
        model.save_pretrained(tmp_path)
    finally:
        model.sampling = Sampling()
    again = MeDiM.from_pretrained(tmp_path)
    assert again.sampling == GUIDED and again.slots == model.slots and again.domains == ("xray", "pathology")
    assert essence(again.sample(n=2, seed=7)) == essence(model.sample(n=2, seed=7, sampling=GUIDED))


def test_progress_and_requests_of_two_domains(model: MeDiM) -> None:
    requests = [Request(f"r{i}", domain, (0, i)) for i, domain in enumerate(["xray", "pathology", "xray"])]
    told: list[int] = []
    samples = list(model.generate("pair", requests, batch_size=2, progress=told.append))
    assert told == [2, 1] and [s.domain for s in samples] == ["xray", "pathology", "xray"]
    assert [s.image.mode for s in samples] == ["L", "RGB", "L"]


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "n": ({"n": 0}, r"n=0: give at least 1"),
    "task": ({"task": "dream"}, r"unknown task 'dream': one of pair, report, image"),
    "domain": ({"domain": "ct"}, r"unknown domain 'ct': .* knows xray, pathology"),
    "batch size": ({"batch_size": 0}, r"batch size 0: give at least 1"),
    "no image": ({"task": "report"}, r"task report needs an image to start from"),
    "no report": ({"task": "image"}, r"task image needs a report to start from"),
    "empty report": ({"task": "image", "report": ""}, r"task image needs a report to start from"),
    "report too many": ({"report": REPORT}, r"task pair makes the report itself"),
    "image too many": (
        {"task": "image", "report": REPORT, "image": PIL.Image.new("L", (96, 96))},
        r"task image makes the image itself",
    ),
    "no such file": ({"task": "report", "image": "nowhere/x.png"}, r"image nowhere/x\.png: no such file"),
}


@pytest.mark.parametrize(("options", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_are_one_line(model: MeDiM, options: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as told:
        model.sample(**options)
    assert "\n" not in str(told.value)


def test_plans_that_cannot_be() -> None:
    with pytest.raises(UserError, match="steps=0: a plan needs at least one step"):
        Sampling().override(None, 0, None, None)
    with pytest.raises(UserError, match="unknown plan 'greedy': one of ancestral, confidence"):
        Sampling().override("greedy", None, None, None)
    asked = Sampling().override("confidence", 5, 1.5, 0.7)
    for plan in (asked.report, asked.image):
        assert (plan.name, plan.steps, plan.guidance, plan.temperature) == ("confidence", 5, 1.5, 0.7)
    assert asked.image.schedule == "cosine" and Sampling().override(None, None, None, None) == Sampling()


def test_folders_that_are_no_models(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: no such model; give a folder"):
        resolve("nowhere")
    assert resolve(tiny_model) == tiny_model
    for missing in ("config.json", "canvas.json", "report_slots.json", "model.safetensors"):
        folder = tmp_path / missing
        shutil.copytree(tiny_model, folder)
        (folder / missing).unlink()
        with pytest.raises(UserError, match=f"not a MeDiM model folder: {missing} is missing"):
            MeDiM.from_pretrained(folder)


def test_weights_that_do_not_fit_or_are_torn(tiny_model: Path, tmp_path: Path) -> None:
    for name in ("less", "torn"):
        shutil.copytree(tiny_model, tmp_path / name)
    weights = load_file(tiny_model / "model.safetensors")
    del weights["adaln.1.linear.weight"]
    save_file(weights, tmp_path / "less" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"do not fit config\.json: 1 missing, first adaln\.1\.linear\.weight"):
        MeDiM.from_pretrained(tmp_path / "less")
    torn = tmp_path / "torn" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1000])
    with pytest.raises(UserError, match="weights cannot be loaded") as told:
        MeDiM.from_pretrained(tmp_path / "torn")
    assert "\n" not in str(told.value)


def scores(model: MeDiM, **options: Any) -> list[NLL]:
    return model.nll(
        [embedded.DOMAINS[name](0, i, "test") for i, name in enumerate(["xray", "pathology", "xray"])], **options
    )


def test_bits_of_a_model_that_knows_nothing(tiny_model: Path) -> None:
    """Uniform over its columns: log2 of 512 a text position and of 16 a code, whatever is masked."""
    model = MeDiM.from_pretrained(tiny_model)
    model.model.output_weight.data.zero_()
    kinds: dict[Any, float] = {"text": math.log2(512), "image": math.log2(16)}
    off = []
    for it in scores(model, n_times=64):
        for kind, bits in kinds.items():
            wanted = it.tokens[kind] * bits
            off.append((it.bits[kind] - wanted) / it.standard_error[kind])
            assert 0 < it.standard_error[kind] < 0.4 * wanted
            assert it.bits_per_token(kind) == pytest.approx(it.bits[kind] / it.tokens[kind])
        assert it.tokens["image"] == 36 and it.tokens["text"] in (16, 32, 48)
    assert np.abs(off).max() < 5


def test_bits_of_some_roles(model: MeDiM) -> None:
    both, report, image = (
        scores(model, roles=roles, n_times=4) for roles in (("report", "image"), ("report",), ("image",))
    )
    assert [it.id for it in both] == [it.id for it in report] and len(both) == 3
    for it in (*both, *report, *image):
        assert all(math.isfinite(value) and value > 0 for value in it.bits.values())
    assert all(set(it.bits) == {"text"} for it in report) and all(set(it.bits) == {"image"} for it in image)
    assert scores(model, n_times=4) == both and scores(model, n_times=4, seed=1) != both
    assert all(math.isnan(value) for it in scores(model, n_times=1) for value in it.standard_error.values())
