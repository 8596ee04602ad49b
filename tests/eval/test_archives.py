"""Protocols on miniatures of archives, translation, and what only a model has: ranking, nearness to training images."""

from __future__ import annotations

import json
import re
from pathlib import Path

import nibabel
import numpy as np
import PIL.Image
import pytest

from eval.run import main

EVAL = Path(__file__).parents[2] / "eval"


def picture(path: Path, seed: int, side: int = 64) -> PIL.Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 255, (8, 8), dtype=np.uint8)
    image = PIL.Image.fromarray(coarse).resize((side, side), PIL.Image.Resampling.BICUBIC)
    image.save(path)
    return image


def figures(out: Path, domain: str, task: str) -> dict[str, dict[str, float]]:
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    return results["domains"][domain]["tasks"][task]["figures"]


def test_a_folder_as_the_authors_have_it(tmp_path: Path, tiny_model: Path) -> None:
    root = tmp_path / "pathgen" / "test"
    for i in range(6):
        picture(root / f"TCGA-05-{i}_1_2.png", i)
        (root / f"TCGA-05-{i}_1_2.txt").write_text(f"Dense tissue, field {i}.")
    out = tmp_path / "out"
    command = [str(EVAL / "pathgen_report.yaml"), "data.source=folder", f"data.root={tmp_path / 'pathgen'}"]
    given = ["text=[bleu]", "--model", str(tiny_model), "--out", str(out), "--limit", "4"]
    assert main([*command, *given]) == 0
    results = json.loads((out / "results.json").read_text())
    found = results["domains"]["pathology"]["tasks"]["report"]
    assert len(found["rows"]) == 4 and "coherence" not in found["figures"]
    assert {"bleu-1", "failed"} <= found["figures"].keys() and found["findings"] == {}
    assert results["interval_over"] == {"pathology": "4 patients"}
    assert "MeDiM" in (out / "report.html").read_text()  # what is published stands beside


def test_translation_by_others(tmp_path: Path) -> None:
    root, theirs, lines = tmp_path / "data", tmp_path / "theirs", []
    theirs.mkdir()
    for i in range(12):
        picture(root / f"{i}-t1.png", i)
        wanted = picture(root / f"{i}-t2.png", 100 + i)
        images = {"image": [f"{i}-t1.png", f"{i}-t2.png"], "view": ["t1", "t2"]}
        lines.append({"id": f"s{i}", **images, "report": "", "modality": "mri", "patient": f"p{i}", "split": "test"})
        if i != 5:
            wanted.save(theirs / f"image_s{i}.png")
    (root / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [str(EVAL / "translation.yaml"), f"data.root={root / 'pairs.jsonl'}", "--predictions", str(theirs)]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    found = figures(tmp_path / "out", "mri", "translate")
    assert found["ssim"]["value"] == pytest.approx(11 / 12) and found["mae"]["value"] == pytest.approx(1 / 12)
    assert found["psnr"]["value"] == pytest.approx(100 * 11 / 12) and found["failed"]["value"] == pytest.approx(1 / 12)
    for i in range(12):  # the source instead of what was wanted
        PIL.Image.open(root / f"{i}-t1.png").save(theirs / f"image_s{i}.png")
    assert main([*command, "--out", str(tmp_path / "worse")]) == 0
    worse = figures(tmp_path / "worse", "mri", "translate")
    assert worse["ssim"]["value"] < 0.7 and worse["mae"]["value"] > 0.05 and worse["failed"]["value"] == 0


def test_what_a_translation_must_beat(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CT of MRI, by its own domain; the floor is the best of the source, the mean and the nearest training slice."""
    rng = np.random.default_rng(0)
    for name, least in (("a", 2), ("b", 5), ("c", 2)):  # where the cube begins: a has the shape of c
        for word, value in (("mr", 200), ("ct", 80)):
            volume = np.zeros((12, 12, 12), np.int16)
            volume[least:10, least:10, least:10] = value + rng.integers(0, 5, (10 - least,) * 3)
            (tmp_path / "heads" / name).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "heads" / name / f"{word}.nii.gz")
    picture(tmp_path / "theirs" / "image_0.png", 0)
    data = [f"data.root={tmp_path / 'heads'}", "data.options={held_out: [c], every: 6, content: 0, window: 0 400}"]
    command = [str(EVAL / "translation.yaml"), *data, "domains=[ct]", "translate=[mri,ct]"]
    assert main([*command, "--predictions", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]) == 0
    found = figures(tmp_path / "out", "ct", "translate")
    assert found["failed"]["value"] == pytest.approx(5 / 6)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    rows = results["domains"]["ct"]["tasks"]["translate"]["rows"]
    for row in rows:  # the page shows what was given beside what was made and what was wanted
        assert list(row["sources"]) == [f"mri {row['study'].split('-')[1]}"]
        assert all((tmp_path / "out" / file).is_file() for file in (row["real_image"], *row["sources"].values()))
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("given: mri ") == page.count('alt="Real image of c-') == 6
    about = str(found["psnr"]["about"])
    known = {name: float(re.search(rf"{name} ([\d.]+)", about)[1]) for name in ("copy", "mean", "nearest")}  # type: ignore[index]
    assert found["psnr"]["floor"] == pytest.approx(max(known.values()), rel=1e-3)
    assert known["copy"] < known["mean"] < known["nearest"]
    capsys.readouterr()
    for names, said in (
        ("mri,t9", "no ct study of the split test that has mri and t9"),
        ("ct,ct", "ct is named twice"),
    ):
        theirs = ["--predictions", str(tmp_path / "theirs"), "--out", str(tmp_path / names)]
        assert main([*command[:-1], f"translate=[{names}]", *theirs]) == 2
        assert said in capsys.readouterr().err


def test_ranking_and_training_neighbours(tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    settings = ["domains=[pathology]", "tasks=[pair]", "text=[]", "image=[]", "studies=4", "bootstrap=50"]
    more = ["likelihood.studies=2", "likelihood.n_times=2", "rank={studies: 2, candidates: 3, n_times: 2}"]
    near = ["memorisation={studies: 8, extractor: vq}", "--out"]
    assert (
        main([str(EVAL / "demo.yaml"), *settings, *more, *near, str(tmp_path / "tiny"), "--model", str(tiny_model)])
        == 0
    )
    left_out = json.loads((tmp_path / "tiny" / "results.json").read_text())["not_measured"]
    assert "trained without condition dropout" in left_out["rank"]
    assert main([str(EVAL / "demo.yaml"), *settings, *more, *near, str(out), "--model", "demo"]) == 0
    found = json.loads((out / "results.json").read_text())["domains"]["pathology"]
    assert found["rank"]["n"] == 2 and found["rank"]["chance"] == pytest.approx(1 / 3)
    copies = found["memorisation"]
    assert 0 <= copies["copy_rate/vq@128"]["value"] <= 1 and len(copies["closest"]) == 4
    for one in copies["closest"]:
        assert (out / one["generated"]).is_file() and (out / one["training"]).is_file()
    distances = [one["distance"] for one in copies["closest"]]
    assert distances == sorted(distances)
    assert "right report found by likelihood" in capsys.readouterr().out
