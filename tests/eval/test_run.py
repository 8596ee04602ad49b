"""`python -m eval.run`: what it says when it is used wrongly, and a whole small run with a random model."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest
import torch

from eval import measure
from eval.protocol import Protocol
from eval.run import main
from medim.config import load
from medim.data import phantom
from medim.metrics.reader import FindingReader

PROTOCOL = "studies: 4\nlikelihood: {studies: 2, n_times: 2}\nbootstrap: 50\n"


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    path = tmp_path / "protocol.yaml"
    path.write_text(PROTOCOL)
    return path


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A finding reader with random weights in place of the shipped one."""
    torch.manual_seed(0)
    FindingReader(phantom.FINDINGS, widths=(8, 8, 8)).save_pretrained(tmp_path / "assets" / "reader-xray")
    monkeypatch.setattr(measure, "ASSETS", tmp_path / "assets")
    measure._xray_reader.cache_clear()
    yield
    measure._xray_reader.cache_clear()


def said(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """Run what must fail; the one line that it says."""
    assert main([str(a) for a in argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def test_no_such_protocol(capsys, tmp_path):
    assert "no such file" in said(capsys, tmp_path / "no.yaml", "--model", "demo", "--out", tmp_path / "out")


def test_a_typing_mistake_in_a_protocol(capsys, tmp_path, protocol):
    protocol.write_text("studdies: 3\n")
    line = said(capsys, protocol, "--model", "demo", "--out", tmp_path / "out")
    assert 'did you mean "studies"?' in line and "protocol.yaml" in line


def test_a_wrong_value_in_a_protocol(capsys, tmp_path, protocol):
    protocol.write_text("domains: [xray, mri]\n")
    assert "'pathology'" in said(capsys, protocol, "--model", "demo", "--out", tmp_path / "out")


def test_no_such_model(capsys, tmp_path, protocol):
    line = said(capsys, protocol, "--model", tmp_path / "none", "--out", tmp_path / "out")
    assert "no such model" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("option", "value"), [("--limit", 0), ("--seed", -1), ("--batch-size", 0)])
def test_numbers_out_of_range(capsys, tmp_path, protocol, option, value):
    line = said(capsys, protocol, "--model", "demo", "--out", tmp_path / "out", option, value)
    assert f"{option} {value}" in line


def test_a_folder_with_other_files_is_left_alone(capsys, tmp_path, protocol, tiny_model):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    assert "holds other files" in said(capsys, protocol, "--model", tiny_model, "--out", out)
    assert [p.name for p in out.iterdir()] == ["mine.txt"]


def test_out_is_a_file(capsys, tmp_path, protocol, tiny_model):
    assert "cannot be made" in said(capsys, protocol, "--model", tiny_model, "--out", protocol)


def test_help_teaches_by_example(capsys):
    assert main([]) == 0
    assert "python -m eval.run eval/demo.yaml" in capsys.readouterr().out


def test_the_demo_protocol_is_the_documented_one():
    assert load(Path(__file__).parents[2] / "eval" / "demo.yaml", [], Protocol) == Protocol()


def test_a_whole_run_and_its_resumption(capsys, tmp_path, protocol, tiny_model, reader):
    out = tmp_path / "out"
    command = [str(protocol), "--model", str(tiny_model), "--out", str(out), "--limit", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown and "floor" in shown and "bits per token" in shown
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["samples"] == 2 * 2 * 3 and results["seed"] == 0 and results["limit"] == 2
    for domain in ("xray", "pathology"):
        figures = results["domains"][domain]
        assert set(figures["tasks"]) == {"pair", "report", "image"}
        assert figures["nll"]["text"]["bits_per_token"] > 0 and figures["nll"]["image"]["standard_error"] >= 0
        assert 0 < figures["tokenizer"]["psnr"] < 30 and figures["tokenizer"]["ssim"] < 1
        assert 0 <= figures["tasks"]["report"]["text"]["rouge_l"] < 1
        for task, found in figures["tasks"].items():
            first, second = found["rows"]
            assert first["study"] == f"{domain}-test-000000" and first["id"] == f"{domain}-{task}-00000"
            assert found["forward_passes"] == first["forward_passes"] + second["forward_passes"] > 0
            with PIL.Image.open(out / first["image"]) as picture:
                assert picture.size == (96, 96)
                assert ("synthetic" in picture.info) == (task != "report")  # what is given was not generated
    # a pathology report that is given is read back, and measured real tiles agree with their reports
    pathology = results["domains"]["pathology"]
    assert pathology["tokenizer"]["coherence_real"]["f1"] == 1.0
    assert pathology["tasks"]["report"]["coherence"]["ceiling"] == 1.0
    assert len(pathology["tasks"]["image"]["rows"][0]["told"]) == 3
    page = (out / "report.html").read_text()
    assert "Synthetic. Not for diagnosis." in page and "xray-pair-00001" in page

    # Killed while the second line was written: the first sample is taken from disk, the second is made again.
    folder = out / "samples" / "xray-pair"
    manifest = folder / "manifest.jsonl"
    first, second = manifest.read_text().splitlines(keepends=True)
    edited = json.dumps(json.loads(first) | {"report": "Large left pneumothorax."}) + "\n"
    manifest.write_text(edited + second[:25])
    assert main(command) == 0
    again = json.loads((out / "results.json").read_text())["domains"]["xray"]["tasks"]["pair"]
    assert again["rows"][0]["told"] == ["left pneumothorax"]
    before = results["domains"]["xray"]["tasks"]["pair"]["rows"][1]
    assert {k: v for k, v in again["rows"][1].items() if k != "seconds"} == {
        k: v for k, v in before.items() if k != "seconds"
    }
    assert len(manifest.read_text().splitlines()) == 2

    # The same folder is not for another evaluation.
    capsys.readouterr()
    for changed, what in (([*command, "--seed", "1"], "another seed"), ([*command[:-1], "1"], "another limit")):
        assert what in said(capsys, *changed)
    protocol.write_text(PROTOCOL.replace("4", "5"))
    assert "another protocol" in said(capsys, *command)
