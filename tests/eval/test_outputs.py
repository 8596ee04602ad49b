"""What is read from folders of other systems, and what a killed or divided run keeps."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from eval.outputs import Ledger, read_predictions
from eval.run import main
from eval.studies import references
from medim.data.studies import Study
from medim.errors import UserError

PATHGEN = str(Path(__file__).parents[2] / "eval" / "pathgen_report.yaml")
STUDIES = [Study(f"p1/s{i}", f"p{i // 2}", (), f"Report {i}.") for i in range(4)]


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("L", (16, 16)).save(path)


def test_numbered_files_with_some_missing_empty_and_broken(tmp_path: Path) -> None:
    for i in (0, 2):
        picture(tmp_path / f"image_{i}.png")
    (tmp_path / "image_1.png").write_bytes(b"no picture")
    for i, text in enumerate(("Clear.", "  ", "Large heart.")):
        (tmp_path / f"text_{i:04d}.txt").write_text(text)
    found = read_predictions(tmp_path, "xray", "pair", STUDIES)
    assert [o.study for o in found] == STUDIES
    assert [o.failed for o in found] == ["", "broken image, no report", "", "no image, no report"]
    assert [o.report.strip() for o in found] == ["Clear.", "", "Large heart.", ""]
    assert found[1].picture() is None and found[2].picture() is not None
    assert [o.failed for o in read_predictions(tmp_path, "xray", "report", STUDIES)] == [
        "",
        "no report",
        "",
        "no report",
    ]


def test_files_named_by_study_and_a_folder_a_task(tmp_path: Path) -> None:
    (tmp_path / "xray-report").mkdir()
    (tmp_path / "xray-report" / "text_p1_s3.txt").write_text("Third.")
    (tmp_path / "xray-report" / "p1_s0.txt").write_text("Zeroth.")
    found = read_predictions(tmp_path, "xray", "report", STUDIES)
    assert [o.report for o in found] == ["Zeroth.", "", "", "Third."]


def test_a_manifest_by_study_by_id_or_in_order(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    for lines, wanted in (
        ([{"id": "x", "study": "p1/s2", "image": "a.png", "report": "Two."}], ["", "", "Two.", ""]),
        ([{"id": "p1/s1", "report": "One."}], ["", "One.", "", ""]),
        ([{"id": f"pair-{i}", "report": f"{i}."} for i in range(4)], ["0.", "1.", "2.", "3."]),
    ):
        (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert [o.report for o in read_predictions(tmp_path, "xray", "report", STUDIES)] == wanted
    lines = [{"study": s.id, "seed": seed, "report": f"{seed}"} for seed in (3, 5) for s in STUDIES]
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [(o.seed, o.report) for o in read_predictions(tmp_path, "xray", "report", STUDIES)][3:5] == [
        (3, "3"),
        (5, "5"),
    ]


def test_what_belongs_to_no_study_is_said(tmp_path: Path) -> None:
    (tmp_path / "text_other.txt").write_text("?")
    with pytest.raises(UserError, match=r"nothing there belongs to the 4 xray studies: give manifest\.jsonl"):
        read_predictions(tmp_path, "xray", "report", STUDIES)
    with pytest.raises(UserError, match="no such folder"):
        read_predictions(tmp_path / "none", "xray", "report", STUDIES)
    (tmp_path / "manifest.jsonl").write_text("[1, 2]\n")
    with pytest.raises(UserError, match=r"manifest\.jsonl"):
        read_predictions(tmp_path, "xray", "report", STUDIES)


def test_a_ledger_survives_kills_and_is_shared(tmp_path: Path) -> None:
    first, second = Ledger(tmp_path / "l", 0), Ledger(tmp_path / "l", 1)
    first.add({"key": "a", "x": 1})
    second.add({"key": "b", "x": 2})
    path = tmp_path / "l" / "manifest.jsonl"
    path.write_text(path.read_text() + '{"key": "c", "x"')
    again = Ledger(tmp_path / "l", 0)
    assert set(again.lines()) == {"a", "b"}
    again.add({"key": "d", "x": 4})
    assert {key: line["x"] for key, line in again.wait(["a", "d"], lambda: None).items()} == {"a": 1, "b": 2, "d": 4}

    def gone() -> None:
        raise UserError("process 1 failed")

    with pytest.raises(UserError, match="process 1"):
        again.wait(["z"], gone)


def test_the_layout_of_the_authors_scripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """response_dir/text_I.txt against gt_dir/text_I.txt, 5% of them missing: counted, and zero."""
    theirs, real = tmp_path / "theirs", tmp_path / "theirs" / "gt"
    real.mkdir(parents=True)
    for i in range(40):
        words = f"Dense lymphoid tissue number {i} with pink collagen and small nuclei."
        (real / f"text_{i}.txt").write_text(words)
        if i % 20 != 3:
            (theirs / f"text_{i}.txt").write_text(words)
    (theirs / "text_99.txt").write_text("belongs to no reference")
    out = tmp_path / "out"
    command = [PATHGEN, "--predictions", str(theirs), "--out", str(out), "text=[bleu,rouge_l,bleu_medim]"]
    assert main(command) == 0
    found = json.loads((out / "results.json").read_text())["domains"]["pathology"]["tasks"]["report"]
    assert found["failed"] == 2 and len(found["rows"]) == 40
    assert [row["study"] for row in found["rows"] if row["failed"]] == ["3", "23"]
    for name in ("rouge_l", "bleu_medim-1", "bleu_medim-4"):
        assert found["figures"][name]["value"] == pytest.approx(38 / 40), name
    assert found["figures"]["failed"]["value"] == pytest.approx(0.05)
    assert "no report" in (out / "report.html").read_text()
    capsys.readouterr()
    elsewhere = [*command[:3], "--references", str(tmp_path / "none"), "--out", str(tmp_path / "o")]
    assert main(elsewhere) == 2 and "no such folder" in capsys.readouterr().err
    assert main([PATHGEN, "--model", "demo", "--references", str(real)]) == 2
    assert "goes with --predictions" in capsys.readouterr().err
    real.rename(tmp_path / "elsewhere")
    assert main([*command[:3], "--out", str(tmp_path / "o")]) == 2
    assert "--references DIR of real ones" in capsys.readouterr().err


def test_references_with_images(tmp_path: Path) -> None:
    for i in (2, 10, 1):
        picture(tmp_path / f"image_{i:03d}.png")
    (tmp_path / "text_10.txt").write_text("Ten.")
    assert [(s.id, len(s.images), s.report) for s in references(tmp_path, "xray")] == [
        ("1", 1, ""),
        ("2", 1, ""),
        ("10", 1, "Ten."),
    ]
