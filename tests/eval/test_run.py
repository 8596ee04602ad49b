"""`python -m eval.run`: what it says when it is used wrongly, and a whole small run with a random model."""

from __future__ import annotations

import json
import shutil
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

PROTOCOL = """
studies: 4
text: [bleu, rouge_l, distinct]
image: [fid, prdc]
likelihood: {studies: 2, n_times: 2}
bootstrap: 50
"""


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
    protocol.write_text("tasks: [pair, dream]\n")
    assert "'report'" in said(capsys, protocol, "--model", "demo", "--out", tmp_path / "out")
    for line, words in (
        ("domains: [xray, mri]", "was not trained on mri; it knows xray, pathology"),
        ("tasks: [translate]", "have one image each"),
        ("seeds: []", "give one at least"),
        ("data: {source: pathgen}", "add data.root=DIR to the command"),
        ("data: {source: pathgn, root: .}", "one of demo"),
        ("sampling: no.yaml", "no such file of sampling plans"),
    ):
        protocol.write_text(line + "\n")
        assert words in said(capsys, protocol, "--model", "demo", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_guidance_of_a_model_that_has_none_claims_no_folder(capsys, tmp_path, protocol, tiny_model):
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"condition_dropout": 0.0}))
    (tmp_path / "plan.yaml").write_text("image: {guidance: 2.0}\n")
    plan = f"sampling={tmp_path / 'plan.yaml'}"
    assert "use guidance 0" in said(capsys, protocol, plan, "--model", model, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_or_predictions(capsys, tmp_path, protocol):
    line = said(capsys, protocol, "--predictions", tmp_path / "none", "--out", tmp_path / "out")
    assert "no such folder" in line
    with pytest.raises(SystemExit):
        main([str(protocol), "--out", str(tmp_path / "out")])
    assert "--model --predictions is required" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "eval").glob("*.yaml")), ids=lambda path: path.stem
)
def test_each_protocol_is_one_and_says_how_it_is_run(path):
    load(path, [], Protocol)
    header = path.read_text().split("\n\n")[0]
    assert f"eval/{path.name}" in header and header.startswith("#")


def untimed(results):
    """Without what another run takes another time for."""
    if isinstance(results, dict):
        timed = ("seconds", "sampling_seconds")
        return {key: untimed(value) for key, value in results.items() if key not in timed}
    return [untimed(one) for one in results] if isinstance(results, list) else results


def test_a_whole_run_and_its_resumption(capsys, tmp_path, protocol, tiny_model, reader):
    out = tmp_path / "out"
    command = [str(protocol), "--model", str(tiny_model), "--out", str(out), "--limit", "2"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "report.html" in shown and "floor" in shown and "bits per token" in shown
    results = json.loads((out / "results.json").read_text(), parse_constant=pytest.fail)
    assert results["samples"] == 2 * 2 * 3 and results["seeds"] == [0] and results["limit"] == 2
    for domain in ("xray", "pathology"):
        found = results["domains"][domain]
        assert set(found["tasks"]) == {"pair", "report", "image"}
        assert found["nll"]["text"]["bits_per_token"] > 0 and found["nll"]["image"]["standard_error"] >= 0
        assert 0 < found["tokenizer"]["psnr"] < 30 and found["tokenizer"]["ssim"] < 1
        assert 0 <= found["tasks"]["report"]["figures"]["rouge_l"]["value"] < 1
        assert "rouge_l" not in found["tasks"]["pair"]["figures"]  # no real report to be held against
        assert any(name.startswith("fid/vq@") for name in found["tasks"]["pair"]["figures"])
        for task, one in found["tasks"].items():
            first, second = one["rows"]
            assert first["study"] == f"{domain}-test-000000" and first["id"] == f"{domain}-{task}-00000"
            assert one["forward_passes"] == first["forward_passes"] + second["forward_passes"] > 0
            assert (first["image"] is None) == (task == "report")
            with PIL.Image.open(out / first["real_image"]) as picture:
                assert picture.size == (96, 96) and "synthetic" not in picture.info
            if first["image"]:
                with PIL.Image.open(out / first["image"]) as picture:
                    assert picture.size == (96, 96) and "synthetic" in picture.info
    # a pathology report that is given is read back, and measured real tiles agree with their reports
    pathology = results["domains"]["pathology"]
    assert pathology["tasks"]["report"]["figures"]["coherence"]["ceiling"] == 1.0
    assert len(pathology["tasks"]["image"]["rows"][0]["told"]) == 3
    page = (out / "report.html").read_text()
    assert "Synthetic. Not for diagnosis." in page and "xray-pair-00001" in page

    # Killed while the second line was written: the first sample is taken from disk, the second is made again.
    manifest = out / "samples" / "xray-pair" / "manifest.jsonl"
    first, second = manifest.read_text().splitlines(keepends=True)
    edited = json.dumps(json.loads(first) | {"report": "Large left pneumothorax."}) + "\n"
    manifest.write_text(edited + second[:25])
    assert main(command) == 0
    again = json.loads((out / "results.json").read_text())["domains"]["xray"]["tasks"]["pair"]
    assert again["rows"][0]["told"] == ["left pneumothorax"]
    assert untimed(again["rows"][1]) == untimed(results["domains"]["xray"]["tasks"]["pair"]["rows"][1])
    assert len(manifest.read_text().splitlines()) == 2

    # More studies and other metrics go on from there; another evaluation does not.
    assert main([*command[:-1], "3", "text=[bleu]"]) == 0
    more = json.loads((out / "results.json").read_text())["domains"]["xray"]["tasks"]["pair"]["rows"]
    assert [row["told"] for row in more[:1]] == [["left pneumothorax"]] and len(more) == 3
    capsys.readouterr()
    assert "another protocol" in said(capsys, *command, "--seed", "1")
    assert "another protocol" in said(capsys, *command, "likelihood.n_times=3")


def test_two_processes_give_the_same_figures(tmp_path, protocol, tiny_model):
    found = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        command = [str(protocol), "domains=[pathology]", "--model", str(tiny_model), "--out", str(out)]
        assert main([*command, "--processes", str(processes)]) == 0
        found.append(untimed(json.loads((out / "results.json").read_text())))
    assert found[0]["domains"] == found[1]["domains"]
    assert len(list((tmp_path / "out2" / "samples" / "pathology-pair").glob("manifest*.jsonl"))) == 2


def test_a_process_that_fails_ends_the_others(capsys, tmp_path, protocol, tiny_model, monkeypatch):
    monkeypatch.setattr("eval.run.sys.executable", "false")  # each other process ends at once, with 1
    line = said(capsys, protocol, "--model", tiny_model, "--out", tmp_path / "out", "--processes", 2)
    assert "process 1 of 2 failed; the same command goes on" in line


def test_seeds_are_pooled(tmp_path, protocol, tiny_model):
    out = tmp_path / "out"
    assert main([str(protocol), "domains=[pathology]", "tasks=[pair]", "seeds=[0,7]", "--limit", "2",
                 "--model", str(tiny_model), "--out", str(out)]) == 0  # fmt: skip
    rows = json.loads((out / "results.json").read_text())["domains"]["pathology"]["tasks"]["pair"]["rows"]
    assert [(row["study"][-1], row["seed"]) for row in rows] == [("0", 0), ("1", 0), ("0", 7), ("1", 7)]
    assert rows[0]["report"] != rows[2]["report"]


def test_downstream_trains_both_arms_and_compares_them(capsys, tmp_path, tiny_model):
    out, path = tmp_path / "out", Path(__file__).parents[2] / "eval" / "downstream.yaml"
    steps = "train.steps=2,train.batch_size=2,train.checkpoint_every=1,train.precision=fp32,train.warmup=1"
    shape = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=2,intermediate_size=32"
    small = ",".join([steps, *(f"model.backbone.{one}" for one in shape.split(","))])
    command = [str(path), "--model", str(tiny_model), "--out", str(out), "studies=3", "text=[bleu]", "bootstrap=50",
               "domains=[pathology]", "downstream.real=6", "downstream.synthetic=3",
               f"downstream.overrides=[{small}]"]  # fmt: skip
    assert main(command) == 0
    found = json.loads((out / "results.json").read_text())["downstream"]
    assert found["studies"]["real"] == 6 and found["studies"]["synthetic"] <= 3
    assert "pathology/report/bleu-1" in found["figures"]
    assert "<html" in (out / "report.html").read_text()
    assert {path.name for path in (out / "training").iterdir()} == {"real", "both"}
    both, real = ((out / "training" / arm / "config.yaml").read_text() for arm in ("both", "real"))
    assert "prepared/synthetic" in both and "prepared/synthetic" not in real
    capsys.readouterr()
    assert main(command) == 0  # all of it is there already
    assert "trained to the end already" in capsys.readouterr().err
