"""What is shipped is whole, small, and does what README.md says of it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from medim import MeDiM
from medim.data import embedded, phantom
from medim.metrics.coherence import micro, shuffled_floor
from medim.metrics.reader import FindingReader
from medim.pipeline import ASSETS, Request
from medim.tokenization.image import VQTokenizer
from medim.tokenization.text import TextTokenizer

ROOT = Path(__file__).parent.parent
SIDE = 128  # pixels of the demo model's pictures


@pytest.fixture(scope="module")
def demo() -> MeDiM:
    return MeDiM.from_pretrained("demo")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", ["demo-vq", "demo-bpe"])
def test_manifests_name_the_files_that_are_there(name: str) -> None:
    folder = ROOT / "tokenizers" / name
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["licence"] and manifest["command"].startswith("python tokenizers/")
    for file, digest in manifest["sha256"].items():
        assert sha256(folder / file) == digest, file
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 6e6


def test_the_demo_model_holds_the_shipped_tokenizers(demo: MeDiM) -> None:
    """At a larger size than they were trained at."""
    assert demo.joint.image.config.resolution == SIDE and demo.joint.codes == demo.model.config.places == 256
    ours = VQTokenizer.from_pretrained(ROOT / "tokenizers" / "demo-vq").state_dict()
    theirs = demo.joint.image.state_dict()
    assert all((ours[name] == value).all() for name, value in theirs.items()) and ours.keys() == theirs.keys()
    text = TextTokenizer.from_pretrained(ROOT / "tokenizers" / "demo-bpe")
    words = "The heart is mildly enlarged. Small left pneumothorax. Größe 3 µm"
    assert text.encode(words) == demo.joint.text.encode(words) and text.decode(text.encode(words)) == words
    assert 3e6 < sum(p.numel() for p in demo.model.parameters()) < 8e6
    assert demo.domains == ("xray", "pathology") or set(demo.domains) == {"xray", "pathology"}


def test_every_embedded_report_fits_its_slot(demo: MeDiM) -> None:
    for index in range(200):
        report = embedded.study(0, index, "test", pixels=SIDE).report
        assert demo.joint.text.decode(demo.joint.report_ids(report)) == report


def test_the_reader_reads_reconstructions(demo: MeDiM) -> None:
    studies = [phantom.study(0, i, "test", pixels=SIDE) for i in range(48)]
    pictures = demo.joint.image.decode(demo.joint.image.encode([s.images[0].pixels for s in studies]), gray=True)
    told = [phantom.parse(s.report) for s in studies]
    seen = FindingReader.from_pretrained(ASSETS / "reader-xray").read(pictures)
    assert micro(seen, told).f1 > 0.95 > 0.6 > shuffled_floor(seen, told)


@pytest.mark.parametrize("task", ["report", "image", "pair"])
def test_xray_samples_are_coherent_well_above_chance(demo: MeDiM, task: str) -> None:
    studies = [phantom.study(0, i, "test", pixels=SIDE) for i in range(24)]
    requests = [
        Request(
            s.id,
            "xray",
            (0, i),
            image=s.images[0].pixels if task == "report" else None,
            report=s.report if task == "image" else None,
        )
        for i, s in enumerate(studies)
    ]
    samples = list(demo.generate(task, requests, batch_size=24))
    reader = FindingReader.from_pretrained(ASSETS / "reader-xray")
    seen, told = reader.read([s.image for s in samples]), [phantom.parse(s.report) for s in samples]
    assert micro(seen, told).f1 > shuffled_floor(seen, told) + 0.15
    assert all(s.report.strip() for s in samples)
