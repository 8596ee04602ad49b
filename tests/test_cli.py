"""The commands as a user types them: what they write, and what they say to mistakes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from medim import cli
from medim.data.sources import SOURCES
from medim.gallery import NOTICE

ROOT = Path(__file__).parent.parent


def sample(*argv: object) -> int:
    return cli.run(cli.sample, [str(a) for a in argv])


def manifest(out: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def one_line(capsys: pytest.CaptureFixture[str], *words: str) -> None:
    said = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert len(errors) == 1 and said[-1] == errors[0], said
    for word in words:
        assert word in errors[0], errors[0]


def test_pairs_are_reproducible_and_marked_synthetic(tiny_model: Path, tmp_path: Path) -> None:
    for out, batch_size in (("A", 4), ("B", 1)):
        argv = (tiny_model, "--task", "pair", "--domain", "xray", "-n", 4, "--seed", 3, "--batch-size", batch_size)
        assert sample(*argv, "--out", tmp_path / out) == 0
    a, b = manifest(tmp_path / "A"), manifest(tmp_path / "B")
    assert a == b and len(a) == 4
    needed = (
        "id",
        "task",
        "domain",
        "seed",
        "image",
        "report",
        "plan",
        "guidance",
        "forward_passes",
        "model",
        "synthetic",
    )
    assert set(a[0]) >= set(needed)
    for line in a:
        first, second = (tmp_path / out / str(line["image"]) for out in ("A", "B"))
        assert first.read_bytes() == second.read_bytes()
        with PIL.Image.open(first) as image:
            assert image.text["synthetic"] == NOTICE and image.mode == "L"  # type: ignore[attr-defined]
    with PIL.Image.open(tmp_path / "A" / "contact_sheet.png") as sheet:
        assert sheet.width > 400 and sheet.text["synthetic"] == NOTICE  # type: ignore[attr-defined]


def test_report_for_an_image_and_image_for_a_report(tiny_model: Path, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    PIL.Image.linear_gradient("L").save(picture)
    assert sample(tiny_model, "--task", "report", "--image", picture, "-n", 1, "--out", tmp_path / "r") == 0
    assert sample(tiny_model, "--task", "image", "--report", "Clear lungs.", "-n", 2, "--out", tmp_path / "i") == 0
    assert [line["report"] for line in manifest(tmp_path / "i")] == ["Clear lungs."] * 2
    (tmp_path / "in.jsonl").write_text(
        '{"id": "x", "image": "a.png"}\n{"id": "y", "image": "a.png", "domain": "pathology"}\n'
    )
    assert (
        sample(tiny_model, "--task", "report", "--input", tmp_path / "in.jsonl", "-n", 1, "--out", tmp_path / "l") == 0
    )
    assert [(line["id"], line["domain"]) for line in manifest(tmp_path / "l")] == [("x", "xray"), ("y", "pathology")]


BROKEN: list[tuple[Sequence[str], Sequence[str]]] = [
    (("nowhere",), ("nowhere", "no such model")),
    (("MODEL", "--task", "pear"), ("pear", "pair, report, image")),
    (("MODEL", "-n", "0"), ("-n 0", "at least 1")),
    (("MODEL", "--n", "-3"), ("-n -3",)),
    (("MODEL", "--domain", "ultrasound"), ("ultrasound", "xray, pathology")),
    (("MODEL", "--task", "report"), ("needs an image",)),
    (("MODEL", "--task", "report", "--image", "missing.png"), ("missing.png",)),
    (("MODEL", "--task", "report", "--image", "README.md"), ("README.md", "image")),
    (("MODEL", "--task", "image", "--report", ""), ("needs a report",)),
    (("MODEL", "--task", "image", "--report", "x", "--image", "a.png"), ("leave the given image out",)),
    (("MODEL", "--plan", "magic"), ("magic", "ancestral, confidence")),
    (("MODEL", "--steps", "0"), ("steps=0",)),
    (("MODEL", "--temperature", "-1"), ("temperature",)),
    (("MODEL", "--batch-size", "0"), ("batch size 0",)),
    (("MODEL", "--input", "missing.jsonl"), ("missing.jsonl", "no such file")),
    (("MODEL", "--device", "quantum"), ("quantum",)),
]


@pytest.mark.parametrize(("argv", "words"), BROKEN, ids=[" ".join(a) for a, _ in BROKEN])
def test_a_mistake_is_one_line_and_writes_nothing(
    argv: Sequence[str],
    words: Sequence[str],
    tiny_model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    given = [str(tiny_model) if a == "MODEL" else a for a in argv]
    assert sample(*given, "--out", tmp_path / "out") == 2
    one_line(capsys, *words)
    assert not (tmp_path / "out").exists()


def test_results_are_never_overwritten(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert sample(tiny_model, "-n", 1, "--out", tmp_path) == 2
    one_line(capsys, "holds other results")
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_a_model_with_other_tokenizers_is_refused(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(tiny_model, tmp_path / "mixed")
    canvas = tmp_path / "mixed" / "canvas.json"
    data = json.loads(canvas.read_text())
    data["vocabulary"]["image"][1] += 4
    canvas.write_text(json.dumps(data))
    assert sample(tmp_path / "mixed", "-n", 1, "--out", tmp_path / "out") == 2
    one_line(capsys, "vocabulary", "image codes")
    (tmp_path / "mixed" / "model.safetensors").write_bytes(b"not safetensors")
    shutil.copy(tiny_model / "canvas.json", canvas)
    assert sample(tmp_path / "mixed", "-n", 1, "--out", tmp_path / "out") == 2
    one_line(capsys, "mixed")


def test_a_file_where_a_folder_is_to_be_made_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "taken"
    path.write_text("mine")
    assert cli.run(lambda argv: path.mkdir(exist_ok=True), []) == 2
    assert capsys.readouterr().err == f"error: {path}: File exists\n" and path.read_text() == "mine"
    assert cli.run(lambda argv: open(tmp_path / "none").close(), []) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'none'}: No such file or directory\n"


def test_a_config_typo_says_what_was_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = ROOT / "configs" / "train" / "demo.yaml"
    argv = [str(config), f"run_dir={tmp_path / 'r'}", "train.stepz=4", "objective.weighting=soft"]
    assert cli.run(cli.train, argv) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 2 and any('did you mean "steps"' in line for line in said)
    assert not (tmp_path / "r").exists()


def test_prepare_and_score(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["prepare", "demo", "--studies", "5", "--out", str(tmp_path / "d")]
    argv += ["--image-tokenizer", str(tiny_model / "image_tokenizer")]
    assert cli.main(argv) == 0 and cli.main(argv) == 0  # the second time all is there
    assert "5 studies" in capsys.readouterr().out
    assert cli.main(["score", str(tiny_model), "--demo", "2", "--n-times", "4"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 2 and all(row["image_bits"] > 0 and row["text_bits"] > 0 for row in rows)
    assert cli.main(["prepare", "demo", "--studies", "0", "--out", str(tmp_path / "e")]) == 2
    assert cli.main(["scoer"]) == 2


@pytest.fixture(scope="module")
def scored_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, said to know what a missing condition is, in a folder with two pictures."""
    folder = tmp_path_factory.mktemp("scored")
    shutil.copytree(tiny_model, folder / "m")
    config = json.loads((folder / "m" / "config.json").read_text())
    (folder / "m" / "config.json").write_text(json.dumps(config | {"condition_dropout": 0.1}))
    for k in range(2):
        PIL.Image.new("L", (96, 96), 100 * k).save(folder / f"{k}.png")
    return folder


def scored(folder: Path, lines: list[dict[str, Any]], *more: str) -> int:
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return cli.main(["score", str(folder / "m"), "--input", str(folder / "in.jsonl"), "--n-times", "2", *more])


def test_score_of_pairs(scored_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [{"id": f"p{k}", "image": f"{k}.png", "report": "No effusion."} for k in range(2)]
    outputs = []
    for more in ([], ["--given", "image"], ["--given", "report"], ["--fit", "none"]):
        assert scored(scored_model, pairs, *more) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    joint, report, image, plain = outputs
    assert [row["id"] for row in joint] == ["p0", "p1"]
    assert {"bits", "text_bits", "image_bits_per_token", "fit_bits", "fit_standard_error"} <= set(joint[0])
    assert set(joint[0]) - set(plain[0]) == {"fit_bits", "fit_standard_error"}
    assert (
        report[0]["given"] == "image" and "text_bits" in report[0] and not {"image_bits", "fit_bits"} & set(report[0])
    )
    assert image[0]["given"] == "report" and "image_bits" in image[0] and "text_bits" not in image[0]


def test_score_ranks(scored_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reports = ["No effusion.", "Large left pneumothorax.", "The lungs are clear."]
    assert scored(scored_model, [{"id": "a", "image": "1.png", "reports": reports}], "--task", "rank") == 0
    (row,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert len(row["fit_bits"]) == len(row["fit_standard_error"]) == 3
    assert row["best"] == row["fit_bits"].index(max(row["fit_bits"])) and row["best_report"] == reports[row["best"]]
    assert row["margin_bits"] > 0 and row["margin_standard_error"] > 0
    assert scored(scored_model, [{"image": "1.png", "reports": reports}], "--task", "rank", "--n-times", "1") == 0
    assert json.loads(capsys.readouterr().out)["fit_standard_error"] == [None] * 3


GOOD = {"image": "0.png", "report": "No effusion."}
TWO = ["No effusion.", "Lungs are clear."]
SCORE_MISTAKES: dict[str, tuple[list[dict[str, Any]], list[str], str]] = {
    "empty listing": ([], [], "in.jsonl: holds no studies"),
    "no image": ([GOOD, {"report": "x"}], [], "study 00001: needs an image"),
    "empty report": ([GOOD | {"report": " "}], [], "study 00000: needs a report"),
    "no such file": ([GOOD | {"id": "q", "image": "gone.png"}], [], "study q: image gone.png: no such file"),
    "domain": ([GOOD | {"domain": "ct"}], [], "study 00000: unknown domain 'ct'"),
    "long report": ([GOOD | {"report": "No effusion. " * 40}], [], "takes 47: shorten it"),
    "levels": ([GOOD], ["--n-times", "0"], "n_times 0: give at least 1"),
    "one report": ([{"image": "0.png", "reports": TWO[:1]}], ["--task", "rank"], "1 reports to rank: give at least 2"),
    "no reports": ([GOOD], ["--task", "rank"], "needs reports, a list of texts"),
    "empty among": (
        [{"image": "0.png", "reports": [*TWO, ""]}],
        ["--task", "rank"],
        "study 00000: the report is empty",
    ),
    "rank given": ([GOOD], ["--task", "rank", "--given", "image"], "takes no --given"),
}


@pytest.mark.parametrize(("lines", "more", "words"), SCORE_MISTAKES.values(), ids=list(SCORE_MISTAKES))
def test_score_mistakes_are_one_line(
    scored_model: Path, capsys: pytest.CaptureFixture[str], lines: list[dict[str, Any]], more: list[str], words: str
) -> None:
    assert scored(scored_model, lines, *more) == 2
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert not out and len(errors) == 1 and words in errors[0] and "Traceback" not in err


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_scripts_without_arguments_teach(script: str) -> None:
    done = subprocess.run([sys.executable, str(ROOT / script)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and f"python {script}" in done.stdout and len(done.stdout.splitlines()) > 10
    bad = subprocess.run([sys.executable, str(ROOT / script), "--nonsense"], cwd=ROOT, capture_output=True, text=True)
    assert bad.returncode == 2 and "Traceback" not in bad.stderr


@pytest.mark.parametrize("source", SOURCES)
def test_the_help_of_a_source_explains_each_option(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["prepare", source, "--help"])
    assert ended.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert SOURCES[source].about in said and " ".join(SOURCES[source].layout.split()) in said
    for field in dataclasses.fields(SOURCES[source].options):
        assert re.search(rf"--{field.name} X \w+ \w+", said), f"{source}: {field.name} is not explained"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "x", "--out", "o"], "medim prepare nowhere: unknown source; one of demo"),
        (["demo", "root", "--out", "o"], "takes no ROOT"),
        (["demo", "--studies", "many", "--out", "o"], "studies: 'many' (str) given, wanted a valid integer"),
        (["demo", "--lungs", "none", "--out", "o"], "lungs: 'none' (str) given, wanted 'ellipse' or 'real'"),
        (["demo", "--shard", "2/2", "--out", "o"], "--shard 2/2: give I/N with I from 0 to N-1"),
        (["demo", "--batch-size", "0", "--out", "o"], "--batch-size 0: give at least 1"),
    ],
)
def test_mistakes_of_prepare(
    argv: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", *argv]) == 2
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
