"""The labeller's benchmark on packages of two reports each, and without any."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

from benchmarks import labeller

REPORT = """<eCitation><uId id="CXR1"/><AbstractText Label="INDICATION">Pneumonia?</AbstractText>
<AbstractText Label="FINDINGS">{}</AbstractText><MeSH><major>{}</major></MeSH></eCitation>"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Where the two packages are looked for: a folder that is empty at first."""

    def found(package: str, name: str) -> Path | None:
        file = tmp_path / package / name
        return file if file.is_file() else None

    monkeypatch.setattr(labeller, "file_of", found)
    return tmp_path


def test_figures(packages: Path, capsys: pytest.CaptureFixture[str]):
    reports = packages / "radlabels/samples/synthetic_reports"
    reports.mkdir(parents=True)
    (reports / "a.txt").write_text("Cardiomegaly. No pneumothorax. Effusion.")
    (reports / "b.txt").write_text("Possible pneumonia.")
    labels = {
        "a": {"cardiomegaly": "definitely present", "pneumothorax": "definitely absent", "atelectasis": "uncertain"},
        "b": {"pneumonia": "uncertain", "air_space_opacity": "uncertain"},
    }
    (reports.parent / "synthetic_labels.json").write_text(json.dumps(labels))
    (packages / "torchxrayvision/data").mkdir(parents=True)
    with tarfile.open(packages / "torchxrayvision/data/NLMCXR_reports.tgz", "w:gz") as archive:
        for name, words, tag in (
            ("1", "Heart is enlarged.", "Cardiomegaly/mild"), ("2", "Emphysema.", "normal"),
            ("3", "Cardiomegaly.", "No Indexing"),
        ):  # fmt: skip
            raw = REPORT.format(words, tag).encode()
            entry = tarfile.TarInfo(f"{name}.xml")
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))

    returned = labeller.main(["--findings"])
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == returned
    figures = returned["figures"]
    ours, theirs = figures["radlabels"]["ours"], figures["radlabels"]["radlabels' table"]
    both = "certain or doubtful"
    assert [ours["all"][both]["49"][key] for key in ("tp", "fp", "fn")] == [3, 1, 1]  # effusion, atelectasis
    assert [theirs["seen"][both]["49"][key] for key in ("tp", "fp", "fn")] == [1, 0, 1]
    assert [theirs["held out"][both]["49"][key] for key in ("tp", "fp", "fn")] == [2, 0, 0]
    assert ours["all"]["absent"]["49"]["f1"] == 1.0
    assert figures["open_i"]["reports"] == 2
    assert figures["open_i"]["findings"]["cardiomegaly"]["certain"]["f1"] == 1.0
    assert figures["open_i"]["findings"]["emphysema"]["certain"]["fp"] == 1
    assert figures["open_i"]["findings"]["pneumonia"][both]["fp"] == 0


def test_without_the_packages(packages: Path, capsys: pytest.CaptureFixture[str]):
    assert labeller.main([])["figures"] == {"radlabels": None, "open_i": None}
    assert capsys.readouterr().out.count("pip install --no-deps") == 2
