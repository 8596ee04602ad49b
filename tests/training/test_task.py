"""Stored studies as rows: which images, which ids, which slots; a mixture of datasets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from medim.canvas import ROLES
from medim.cli import main
from medim.data import pathology, prepare
from medim.data.order import Order
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.model.backbone import BackboneOptions
from medim.model.medim import MeDiMModel, ModelOptions
from medim.pipeline import MeDiM
from medim.recipe import DataOptions, TrainConfig, make_task
from medim.sampling import Sampling
from medim.tokenization.joint import JointTokenizer
from medim.training.task import Rows, Shown
from medim.training.weights import materialise

SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
REPORTS = ("Heart size is normal.", "No effusion.", "")


def noise(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96), dtype=np.uint8))


def studies(start: int = 0) -> Iterator[Study]:
    """Three images each; the last study has no report."""
    for n, report in enumerate(REPORTS):
        images = tuple(Image("mri", noise(10 * (start + n) + k), f"t{k}") for k in range(3))
        yield Study(f"s{start + n}", "p", images, report)


def write(joint: JointTokenizer, folder: Path, start: int = 0) -> None:
    prepare.prepare(lambda: studies(start), prepare.Encoding(joint.image, joint.text), folder, source="test")


def test_images_take_turns(tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    write(tiny_joint, tmp_path)
    data = prepare.load(tmp_path, tiny_joint.image)
    (first, *_) = studies()
    codes = [tiny_joint.code_ids(tiny_joint.image_codes(image)) for image in first.images]
    for images, turn, wanted in ((1, 0, [0]), (1, 4, [1]), (2, 2, [2, 0]), (3, 1, [1, 2, 0]), (9, 2, [1, 2, 0])):
        row = Rows(tiny_joint, [data], Shown(images)).row(0, 0, turn)
        assert [ROLES[role] for role in row.roles] == ["image"] * len(wanted) + ["report"]
        assert [row.ids[row.segment == n].tolist() for n in range(len(wanted))] == [codes[k] for k in wanted]
    assert [ROLES[role] for role in Rows(tiny_joint, [data]).row(0, 2).roles] == ["image"]


def test_stored_ids_are_used_only_if_they_fit(tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    write(tiny_joint, tmp_path)
    data = prepare.load(tmp_path, tiny_joint.image)
    fit, unfit = (Rows(tiny_joint, [data], fits=fits) for fits in (True, False))
    for index in range(3):
        assert fit.row(0, index).ids.tolist() == unfit.row(0, index).ids.tolist()
    record = data[0] | {"report_ids": [5, 6]}
    assert fit.report_ids(record)[:3] == [5, 6, tiny_joint.text.eos]
    assert unfit.report_ids(record) == tiny_joint.report_ids(REPORTS[0])
    lengths = [len(tiny_joint.report_ids(report)) for report in REPORTS if report]
    assert fit.seen()[0] == {"mri": {n: lengths.count(n) for n in set(lengths)}}


def test_a_mixture_of_datasets(tiny_model: Path, tmp_path: Path) -> None:
    joint = JointTokenizer.from_pretrained(tiny_model)
    for n, name in enumerate(("a", "b")):
        write(joint, tmp_path / name, 100 * n)
    paths = (str(tmp_path / "a"), str(tmp_path / "b"))
    config = TrainConfig(str(tmp_path / "run"), DataOptions(paths, weights=(3.0, 1.0)), init=str(tiny_model))
    task = make_task(config)
    assert task.order == Order(0, (3, 3), (0.75, 0.25))
    assert task.rows.fits and len(task.rows.data) == 2
    sources, indices = task.order.batch(0, config.train.batch_size)
    batches = task.batches(0, 0, 1, 1)
    assert batches[0].canvas.ids.shape[0] == len(sources) == config.train.batch_size
    wanted = [task.rows.row(int(s), int(i), n).ids for n, (s, i) in enumerate(zip(sources, indices, strict=True))]
    ids, mask = batches[0].canvas.ids.numpy(), joint.vocabulary.mask
    for n, row in enumerate(wanted):
        shown = ids[n, : len(row)] != mask
        assert shown.sum() >= 4 and (ids[n, : len(row)] == row)[shown].all()
    with pytest.raises(UserError, match="1 weights for 2 sources"):
        make_task(TrainConfig(str(tmp_path / "run"), DataOptions(paths, weights=(1.0,)), init=str(tiny_model)))


def test_embedded_studies_that_the_command_prepared(tiny_model: Path, tmp_path: Path) -> None:
    tokenizers = ["--image-tokenizer", str(tiny_model / "image_tokenizer")]
    tokenizers += ["--text-tokenizer", str(tiny_model / "text_tokenizer")]
    assert main(["prepare", "demo", "--studies", "4", "--seed", "8", *tokenizers, "--out", str(tmp_path / "data")]) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}

    def run(seed: int) -> TrainConfig:
        data = DataOptions(str(tmp_path / "data"), studies=4)
        return TrainConfig(str(tmp_path / "run"), data, init=str(tiny_model), seed=seed)

    assert [len(data) for data in make_task(run(8)).rows.data] == [4]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == before
    with pytest.raises(UserError, match="give another folder or remove it"):
        make_task(run(9))


def test_a_model_goes_on_at_another_resolution(tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    """Codes of the new grid, from pictures drawn for it; places interpolated, all other weights as they were."""
    shape = BackboneOptions(**SHAPE, intermediate_size=48)
    options = ModelOptions(shape, adaln_dim=16, places=36, alibi=(1.0,))
    model = MeDiMModel.from_options(options, tiny_joint.vocabulary)
    assert model.place is not None
    torch.nn.init.normal_(model.place.weight)
    MeDiM(model, tiny_joint, {"xray": {16: 1}}, Sampling(), "coarse").save_pretrained(tmp_path / "coarse")
    data = DataOptions(str(tmp_path / "data"), studies=3, xrays_in_ten=0)
    said = TrainConfig(str(tmp_path / "run"), data, init=str(tmp_path / "coarse"), resolution=128)
    task = make_task(said)
    first = pathology.study(0, 0, "train", 128)
    joint = task.rows.joint
    assert joint.image.config.resolution == 128 and joint.codes == 64 and task.model.config.places == 64
    assert task.rows.row(0, 0).ids[2:66].tolist() == joint.code_ids(joint.image_codes(first.images[0]))
    materialise(task.model, task.stored, 0, "cpu")
    before, after = model.state_dict(), task.model.state_dict()
    assert after["place.weight"].shape == (65, 32)
    assert all(torch.equal(before[name], after[name]) for name in before if name != "place.weight")
    MeDiM(task.model, joint, {"xray": {16: 1}}, Sampling(), "fine").save_pretrained(tmp_path / "fine")
    (sample,) = MeDiM.from_pretrained(tmp_path / "fine").sample(task="pair", domain="xray", n=1)
    assert sample.image.size == (128, 128)
    with pytest.raises(UserError, match="was prepared at 128 pixels, here images have 96: prepare it"):
        make_task(replace(said, resolution=0, data=replace(data, studies=0)))
    with pytest.raises(UserError, match="resolution 100 is not a multiple of the downsampling 16"):
        make_task(replace(said, resolution=100))
