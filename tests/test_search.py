"""Search: the right one is first when embeddings are equal, and what a user is told."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from medim.cli import run
from medim.cli.search import search
from medim.data import prepare
from medim.data.studies import Image, Study
from medim.errors import UserError
from medim.model.backbone import BackboneOptions
from medim.model.medim import MeDiMModel, ModelOptions
from medim.pipeline import MeDiM
from medim.sampling import Sampling
from medim.search import Index, open_data
from medim.tokenization.joint import JointTokenizer

REPORTS = ("Clear lungs.", "Large left effusion.", "The heart is enlarged.", "Right pneumothorax, no effusion.", "")


def picture(seed: int) -> PIL.Image.Image:
    return PIL.Image.fromarray(np.random.default_rng(seed).integers(0, 255, (96, 96), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tiny_joint: JointTokenizer, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with embeddings, and five studies, one without a report, of two patients."""
    root = tmp_path_factory.mktemp("search")
    backbone = BackboneOptions(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    torch.manual_seed(0)
    model = MeDiMModel.from_options(ModelOptions(backbone=backbone, adaln_dim=16, embed=8), tiny_joint.vocabulary)
    MeDiM(model, tiny_joint, {"xray": {16: 1}}, Sampling(), "s").save_pretrained(root / "model")

    def studies() -> list[Study]:
        return [
            Study(f"s{n}", f"p{n % 2}", (Image("xray", picture(n)),), report, split="test")
            for n, report in enumerate(REPORTS)
        ]

    how = prepare.Encoding(tiny_joint.image, tiny_joint.text)
    how = prepare.Encoding(how.tokenizer, how.text, how.reports.__class__(empty="keep"))
    prepare.prepare(studies, how, root / "data", source="t")
    return root / "model", root / "data"


def test_likeness_is_the_product_of_embeddings(folders: tuple[Path, Path]) -> None:
    model = MeDiM.from_pretrained(folders[0])
    index = Index(model, open_data(folders[1], model), batch_size=3)
    assert index.kept == [0, 1, 2, 3] and index.chance == 0.25
    one = model.embed(reports=[REPORTS[1]])[0]
    assert float(one.norm()) == pytest.approx(1, abs=1e-5)
    hits = index.search(one, 3, "reports")
    assert hits[0].id == "s1" and hits[0].likeness == pytest.approx(1, abs=1e-5)
    image = model.embed(images=[picture(2)])
    torch.testing.assert_close(image[0], index.images[2], atol=1e-5, rtol=0)
    found = index.search(image[0], 9, "reports")
    wanted = sorted((float(image[0] @ t) for t in index.reports), reverse=True)
    assert [h.likeness for h in found] == pytest.approx(wanted, abs=1e-6)
    index.reports = index.images.clone()
    assert index.recall()["image_to_text_recall@1"][0] == 1
    assert len(open_data(folders[1], model, "test", ["p1"])) == 2
    with pytest.raises(UserError, match="no study of patient p7"):
        open_data(folders[1], model, patients=["p7"])
    with pytest.raises(UserError, match="a report is empty"):
        model.embed(reports=[" "])


def test_the_command(
    folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path
) -> None:
    model, data = map(str, folders)
    assert search([model, data, "--report", "Clear lungs.", "-n", "2", "--out", str(tmp_path / "out")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "hits.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["likeness"] >= lines[1]["likeness"]
    with PIL.Image.open(tmp_path / "out" / "hits.png") as sheet:
        assert sheet.width > 400 and "Decoded" in sheet.info["synthetic"]
    picture(3).save(tmp_path / "x.png")
    capsys.readouterr()
    assert search([model, data, "--image", str(tmp_path / "x.png"), "-n", "9"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    assert search([model, data, "--recall"]) == 0
    assert "4 studies; chance of recall@1: 0.2500" in capsys.readouterr().out
    for argv, words in (
        ([str(tiny_model), data, "--recall"], "has no embeddings"),
        ([model, data, "--report", " "], "a report is empty"),
        ([model, data, "--image", "none.png"], "none.png"),
        ([model, data, "--report", "x", "-n", "0"], "at least 1"),
        ([model, data, "--report", "x", "--split", "train"], "no study of the split"),
        ([model, str(tmp_path), "--report", "x"], "no prepared dataset"),
        ([model, data, "--image", str(tmp_path / "x.png"), "--domain", "ct"], "unknown domain 'ct'"),
    ):
        assert run(search, argv) == 2
        said = capsys.readouterr().err
        assert words in said and "Traceback" not in said, said
