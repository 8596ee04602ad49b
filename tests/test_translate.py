"""Images from images: one canvas, several images, told apart by their tags; and a modality added by one line."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from medim.canvas import Canvas, Row, Segment, layout
from medim.cli import run
from medim.cli.sampling import sample
from medim.cli.training import train
from medim.data import prepare
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.given import Request, check_view, completed, read_name, read_source
from medim.model.backbone import BackboneOptions
from medim.model.gates import CrossGates, Gated, Marks, alibi
from medim.model.medim import MeDiMModel, ModelOptions
from medim.pipeline import MeDiM, Sample
from medim.sampling import Plan, Sampling
from medim.tokenization.joint import JointTokenizer
from medim.vocabulary import MODALITIES, Modality, Vocabulary
from tests.conftest import randomise

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VIEWS = {"mri": {"t1 axial": 3, "t2 axial": 1, "gm axial": 1}, "ct": {"soft axial": 1}}


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96), dtype=np.uint8))


def network(vocabulary: Vocabulary, **more: Any) -> MeDiMModel:
    torch.manual_seed(1)
    model = MeDiMModel.from_options(
        ModelOptions(backbone=BackboneOptions(**SHAPE, intermediate_size=48), adaln_dim=16, places=36, **more),
        vocabulary,
    )
    for part in (model.belongs, model.gates, model.place):
        if part is not None:
            torch.nn.init.normal_(part.weight, std=0.5)
    return randomise(model)


@pytest.fixture(scope="module")
def joint(tiny_joint: JointTokenizer) -> JointTokenizer:
    return JointTokenizer.build(tiny_joint.text, tiny_joint.image, tiny_joint.slot)


@pytest.fixture(scope="module")
def folder(joint: JointTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = network(joint.vocabulary, positions="aligned", embed=8)
    model.config.absent, model.config.condition_dropout = 0.3, 0.1
    sampling = Sampling(image=Plan("confidence", steps=3), report=Plan("ancestral", steps=3))
    slots = {"mri": {16: 2}}
    out = tmp_path_factory.mktemp("views") / "model"
    MeDiM(model, joint, slots, sampling, "views", VIEWS).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> MeDiM:
    return MeDiM.from_pretrained(folder)


def images(vocabulary: Vocabulary, *views: str, report: int = 4) -> Row:
    rng = np.random.default_rng(0)
    made = {view: (vocabulary.image[0] + rng.integers(0, 8, 9)).tolist() for view in ("t1", "t2 axial", "flair")}
    segments = [Segment("image", "mri", made[view], view) for view in views]
    return layout([*segments, Segment("report", "text", [1] * report)], vocabulary)


def test_codes_of_one_place_share_a_position() -> None:
    vocabulary = Vocabulary.build(12, 0, 8)
    row = images(vocabulary, "t1", "t2 axial")
    first, second = (row.aligned[row.segment == n] for n in range(2))
    assert first.tolist() == second.tolist() == list(range(4, 13))  # after the longest tags: mri, t2, axial, begin
    assert row.aligned[row.segment == 2].min() > 13 and row.aligned.min() == 0
    assert len(set(row.tags)) == 3 and row.tags[2] == ()
    names = list(vocabulary.tags)
    assert [names[n - 1] for n in row.tags[1]] == ["mri", "view_t2", "view_axial"]
    old = Vocabulary.build(12, 0, 8, views=())  # a model from before views had tags
    assert old.frame("image", "mri", "t2 axial") == old.frame("image", "mri")


BIASES = pytest.mark.parametrize("bias", [{}, {"gates": True}, {"gates": True, "alibi": (2.0, 0.5, 0.0)}], ids=str)


@BIASES
def test_the_order_of_images_does_not_matter_when_positions_are_aligned(bias: dict[str, Any]) -> None:
    """And it does when they are numbered along the row."""
    vocabulary = Vocabulary.build(12, 0, 8)
    rows = [images(vocabulary, "t1", "t2 axial", "flair"), images(vocabulary, "flair", "t1", "t2 axial")]
    place = {"t1": (0, 1), "t2 axial": (1, 2), "flair": (2, 0)}
    for positions, same in (("aligned", True), ("row", False)):
        model = network(vocabulary, positions=positions, **bias)
        found = []
        for row in rows:
            canvas = Canvas.collate([row], 0)
            t = torch.full_like(canvas.ids, 0.3, dtype=torch.float32)
            with torch.no_grad():
                hidden = model(canvas.ids, t, **model.attention(canvas), **model.gating(canvas, t))
            found.append([hidden[0, torch.from_numpy(row.segment == n)] for n in range(4)])
        differences = [float((found[0][a] - found[1][b]).abs().max()) for a, b in (*place.values(), (3, 3))]
        assert (max(differences) < 1e-5) == same


@pytest.mark.parametrize("positions", ["row", "aligned"])
@BIASES
def test_given_images_may_be_computed_once_and_padding_changes_nothing(positions: str, bias: dict[str, Any]) -> None:
    vocabulary = Vocabulary.build(12, 0, 8)
    model = network(vocabulary, positions=positions, **bias)
    model.config.condition_attention = "prefix"
    rows = [images(vocabulary, "t1", "t2 axial"), images(vocabulary, "t1", "t2 axial", "flair", report=7)]
    canvas = Canvas.collate(rows, 0)
    generate = canvas.segment == 1
    ids = torch.where(generate, vocabulary.mask, canvas.ids)
    t = torch.where(generate, 0.7, 0.0)
    with torch.no_grad():
        found = []
        for cache in (True, False):
            bound = model.denoiser(canvas, generate, cache=cache)
            for _ in range(2):  # the second call is answered from memory
                found.append(torch.cat(bound.restricted(ids, t, bound.groups(generate))))
        alone = Canvas.collate(rows[:1], 0)
        bound, length = model.denoiser(alone, alone.segment == 1), alone.ids.shape[1]
        found.append(torch.cat(bound.restricted(ids[:1, :length], t[:1, :length], bound.groups(alone.segment == 1))))
    for other in found[1:4]:
        torch.testing.assert_close(other, found[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[4], found[0][:9], atol=1e-5, rtol=0)


def test_gates_start_as_none(vocabulary: Vocabulary) -> None:
    model = network(vocabulary, gates=True)
    assert model.gates is not None
    canvas = Canvas.collate([images(vocabulary, "t1", "flair"), images(vocabulary, "t1")], 0)
    t = torch.full_like(canvas.ids, 0.3, dtype=torch.float32)
    hidden = {}
    for name, weight in (("zero", 0.0), ("some", 1.0)):
        torch.nn.init.constant_(model.gates.weight, weight)
        with torch.no_grad():
            hidden[name] = model(canvas.ids, t, **model.attention(canvas), **model.gating(canvas, t))
            plain = model(canvas.ids, t, **model.attention(canvas))
    valid = canvas.valid
    torch.testing.assert_close(hidden["zero"][valid], plain[valid], atol=1e-6, rtol=0)
    assert float((hidden["some"] - plain)[valid].abs().max()) > 1e-3


def test_alibi_is_minus_slope_times_distance() -> None:
    """Against a plain loop over pairs; text and tags have no distance, images share one grid."""
    canvas = Canvas.collate([images(Vocabulary.build(12, 0, 8), "t1", "flair")], 0)  # images of 3 x 3 codes
    marks = Marks(CrossGates.kinds(canvas), canvas.segment, canvas.place, torch.zeros(canvas.ids.shape))
    slopes = torch.tensor([2.0, 0.5])
    found = alibi(Gated(marks, marks), slopes, 3)
    places = canvas.place[0].tolist()
    for q, a in enumerate(places):
        for k, b in enumerate(places):
            away = math.dist(divmod(a - 1, 3), divmod(b - 1, 3)) if a and b else 0.0
            assert found[0, :, q, k].tolist() == pytest.approx([-2.0 * away, -0.5 * away], abs=1e-6)
    with pytest.raises(UserError, match=r"square image as model\.places, not 7"):
        MeDiMModel.from_options(ModelOptions(places=7, alibi=(1.0,)), Vocabulary.build(12, 0, 8))


def test_translation_is_a_function_of_the_seed(model: MeDiM) -> None:
    sources = (Image("mri", picture(0), "t1 axial"), Image("ct", picture(1), "soft axial"))
    requests = [
        Request(
            f"r{i}", "mri", (0, i), view="gm axial", sources=sources[: 1 + i % 2], report="Clear." if i == 2 else None
        )
        for i in range(4)
    ]
    one, many = (list(model.generate("translate", requests, batch_size=size)) for size in (1, 4))
    assert [s.codes.tolist() for s in one] == [s.codes.tolist() for s in many]
    names = [s.given for s in one]
    assert names == [
        "mri t1 axial",
        "mri t1 axial and ct soft axial",
        "mri t1 axial and report",
        one[1].given,
    ]
    assert all(s.view == "gm axial" and s.regenerated.all() and (s.given_codes < 0).all() for s in one)
    assert [s.report for s in one] == ["", "", "Clear.", ""] and one[0].codes.tolist() != one[2].codes.tolist()
    other = list(model.generate("translate", [replace(requests[0], view="t2 axial")]))
    assert other[0].codes.tolist() != one[0].codes.tolist()  # the tag is heeded


def test_guidance_weights_of_segments(model: MeDiM) -> None:
    """All weights 1 of a single group is plain guidance; a weight of 0 for all is none."""
    sources = (Image("mri", picture(0), "t1 axial"), Image("ct", picture(1), "soft axial"))
    request = Request("r", "mri", (0, 0), view="gm axial", sources=sources, report="Clear.")

    def made(guidance: float, **weights: float) -> list[list[int]]:
        plan = Plan("confidence", steps=3, guidance=guidance)
        names = {name.replace("_", " "): value for name, value in weights.items()}
        return next(model.generate("translate", [request], sampling=Sampling(image=plan, weights=names))).codes.tolist()

    assert made(300.0) != made(0.0)
    assert made(300.0, image=0, report=0) == made(0.0) == made(0.0, ct=2)
    assert made(300.0, nothing=3) == made(300.0)
    assert made(300.0, t1_axial=0, ct=1, report=0) != made(300.0)
    with pytest.raises(ValueError, match="from 0 on"):
        Sampling(weights={"report": -1.0})


def test_a_translation_by_what_is_expected(model: MeDiM) -> None:
    """The same codes, another picture; that of the codes where the model is sure, and of what is given anywhere."""

    def made(mean: bool, **request: Any) -> Sample:
        how = Sampling(image=Plan("confidence", steps=3, temperature=0.0), mean=mean)
        task = "translate" if "sources" in request else "inpaint"
        return next(model.generate(task, [Request("r", "mri", (0, 0), view="gm axial", **request)], sampling=how))

    sources = (Image("mri", picture(0), "t1 axial"),)
    drawn, expected = made(False, sources=sources), made(True, sources=sources)
    assert np.array_equal(drawn.codes, expected.codes) and drawn.image.tobytes() != expected.image.tobytes()
    assert expected.stats["plan"] == "image:confidence/3 mean"
    head = model.model.output_weight
    with torch.no_grad():
        head.mul_(1e4)
        try:
            for part in ({"sources": sources}, {"image": picture(0), "box": (0, 0, 20, 20)}):
                assert made(False, **part).image.tobytes() == made(True, **part).image.tobytes()
        finally:
            head.div_(1e4)


def test_sample_py_translates(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(0).save(tmp_path / "T1.png")
    picture(1).save(tmp_path / "scan.png")
    one, two = str(tmp_path / "T1.png"), str(tmp_path / "scan.png")
    command = [str(folder), "--task", "translate", "--device", "cpu", "-n", "1"]

    def made(out: str, *more: str) -> dict[str, Any]:
        assert sample([*command, *more, "--out", str(tmp_path / out)]) == 0
        assert (tmp_path / out / "contact_sheet.png").is_file()
        return json.loads((tmp_path / out / "manifest.jsonl").read_text().splitlines()[0])

    first = made("a", "--image", one, "--to", "gm", "--plane", "axial")
    assert (first["view"], first["given"], first["domain"]) == ("gm axial", "mri t1 axial", "mri")
    second = made("b", "--image", f"t2={one}", "--image", f"ct soft axial={two}", "--to", "gm", "--guide", "ct=2")
    assert (second["view"], second["given"]) == ("gm axial", "mri t2 and ct soft axial")
    assert made("c", "--image", f"t1={two}", "--to", "ct soft")["domain"] == "ct"
    lines = [
        {"id": "x", "images": {"t1": "T1.png", "ct": "scan.png"}, "to": "t2"},
        {"id": "y", "images": ["T1.png"], "to": "gm"},
    ]
    (tmp_path / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert made("d", "--input", str(tmp_path / "list.jsonl"))["given"] == "mri t1 and ct"
    assert (
        made("e", "--task", "image", "--report", "Clear.", "--sequence", "t2", "--plane", "axial")["view"] == "t2 axial"
    )
    assert made("f", "--task", "image", "--report", "Clear.")["view"] in VIEWS["mri"]
    capsys.readouterr()
    for number, (words, more) in enumerate({
        "source and target are both mri t1": ["--image", one, "--to", "t1"],
        "two sources are both mri t1": ["--image", f"t1={one}", "--image", f"t1={two}", "--to", "gm"],
        "unknown view 't9' of mri: it has sequence: t1,": ["--image", one, "--to", "t9"],
        "never saw one of mri, only axial, gm, t1, t2": ["--image", one, "--to", "flair"],
        "t1 and t2 are both a sequence": ["--image", one, "--to", "t1 t2"],
        "say with --to what is made": ["--image", one],
        "needs an image to start from": ["--to", "gm"],
        "no such file": ["--image", "t1=nowhere.png", "--to", "gm"],
        "unknown domain 'xray'": ["--image", one, "--to", "xray"],
        "takes one --image": ["--task", "report", "--image", one, "--image", two],
        "has no --to": ["--task", "report", "--image", one, "--to", "gm"],
        "give NAME=W": ["--image", one, "--to", "gm", "--guide", "t1"],
        "saw no report of ct": ["--task", "pair", "--domain", "ct"],
    }.items()):  # fmt: skip
        out = tmp_path / f"bad{number}"
        assert run(sample, [*command, *more, "--out", str(out)]) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1 and not out.exists(), said


def test_a_canvas_too_long_for_so_many_images(model: MeDiM) -> None:
    sources = tuple(Image("mri", picture(n), view) for n, view in enumerate(("t1 axial", "t2 axial")))
    request = Request("r", "mri", (0, 0), view="gm axial", sources=sources)
    assert len(list(model.generate("translate", [request]))) == 1
    model.model.config.backbone["max_position_embeddings"] = 80
    try:
        with pytest.raises(UserError, match="a canvas of 123 positions is longer than the 80"):
            model.generate("translate", [request])
    finally:
        model.model.config.backbone["max_position_embeddings"] = 4096


def test_names_of_images() -> None:
    assert read_source("scans/T1.png", "mri") == Image("mri", Path("scans/T1.png"), "t1")
    assert read_source("head_ct_soft.png", "mri") == Image("ct", Path("head_ct_soft.png"), "soft")
    assert read_source("ct bone=a=b.png", "mri") == Image("ct", Path("a=b.png"), "bone")
    assert read_source("x=1.png", "mri") == Image("mri", Path("x=1.png"), "")  # no name: the file is called so
    assert read_name("Lateral", "xray") == ("xray", "lateral")
    axial = (Image("mri", picture(0), "t1 axial"),)
    assert completed("gm", "mri", axial) == "gm axial" and completed("gm", "mri", axial, "coronal") == "gm coronal"
    assert completed("", "ct", axial) == "axial" and completed("soft sagittal", "ct", axial) == "soft sagittal"
    with pytest.raises(UserError, match="never saw"):
        check_view("mri", "t1", Vocabulary.build(12, 0, 8, views=()), None)


@pytest.fixture
def ultrasound(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(MODALITIES, "ultrasound", Modality(gray=True, views={"probe": ("linear", "convex")}))
    yield


def test_a_modality_is_one_entry_in_a_table(ultrasound: None, tiny_joint: JointTokenizer, tmp_path: Path) -> None:
    """docs/modalities.md: prepared, trained for two steps, sampled and translated by its name."""
    tiny_joint.image.save_pretrained(tmp_path / "vq")
    tiny_joint.text.save_pretrained(tmp_path / "bpe")
    studies = [
        Study(f"s{n}", "p", (Image("ultrasound", picture(n), "linear"), Image("xray", picture(9 + n), "PA")), "Clear.")
        for n in range(4)
    ]
    how = prepare.Encoding(tiny_joint.image, tiny_joint.text)
    prepare.prepare(lambda: studies, how, tmp_path / "data", source="us")
    backbone = "{hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2}"
    (tmp_path / "us.yaml").write_text(
        f"""
run_dir: {tmp_path / "run"}
text_tokenizer: {tmp_path / "bpe"}
image_tokenizer: {tmp_path / "vq"}
data: {{path: {tmp_path / "data"}, images: 2, absent: 0.2}}
model: {{positions: aligned, embed: 8, backbone: {backbone}}}
objective: {{tasks: {{pair: 0.5, translate: 0.5}}, align: 0.1}}
stages: [{{until: 0.5, show: [text, ultrasound]}}]
train: {{steps: 2, batch_size: 4, ema: 0.5, precision: fp32}}
"""
    )
    assert train([str(tmp_path / "us.yaml")]) == 0
    model = MeDiM.from_pretrained(tmp_path / "run" / "final")
    assert set(model.domains) == {"ultrasound", "xray"} and model.views["ultrasound"] == {"linear": 4}
    assert model.sample("image", "ultrasound", report="Clear.", view="linear")[0].view == "linear"
    source = Image("xray", picture(0), "pa")
    assert model.sample("translate", "ultrasound", view="linear", sources=(source,))[0].given == "xray pa"
