"""Open-i on a miniature of NLMCXR: reports as a folder and as the archive, pictures, views."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import PIL.Image
import pytest

from medim.data.packaged import file_of
from medim.data.reports import ReportOptions, prepare_report
from medim.data.sources import open_i
from medim.data.sources.base import split_of
from medim.data.sources.open_i import OpenIOptions, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError


def xml(number: int, images: tuple[str, ...], **texts: str) -> str:
    parts = "".join(f'<AbstractText Label="{label}">{text}</AbstractText>' for label, text in texts.items())
    figures = "".join(f'<parentImage id="{name}"><caption>PA</caption></parentImage>' for name in images)
    return (
        f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="CXR{number}"/><MedlineCitation><Article>'
        f"<Abstract>{parts}</Abstract></Article></MedlineCitation>{figures}</eCitation>"
    )


REPORTS = {
    "10.xml": xml(
        10, ("CXR10_IM-2", "CXR10_IM-1"), FINDINGS="Heart  normal,\n p &lt; 1.", IMPRESSION="Clear.", COMPARISON=""
    ),
    "2.xml": xml(2, ("CXR2_IM-1", "CXR2_IM-7"), INDICATION="XXXX cough", FINDINGS="Lungs clear."),
    "3.xml": xml(3, (), FINDINGS="No picture."),
    "4.xml": "<eCitation><uId id='CXR4'/>",
    "5.xml": "<eCitation></eCitation>",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures alone; no package is installed."""
    monkeypatch.setattr(open_i, "file_of", lambda package, name: None)
    folder = tmp_path / "NLMCXR_png"
    folder.mkdir()
    for name in ("CXR10_IM-1", "CXR10_IM-2", "CXR2_IM-1"):
        PIL.Image.new("L", (40, 48), 99).save(folder / f"{name}.png")
    return tmp_path


def unpacked(root: Path) -> None:
    folder = root / "ecgen-radiology"
    folder.mkdir()
    for name, text in REPORTS.items():
        (folder / name).write_text(text)


def packed(root: Path) -> Path:
    unpacked(root)
    archive = root / open_i.REPORTS
    with tarfile.open(archive, "w:gz") as file:
        file.add(root / "ecgen-radiology", "ecgen-radiology")
    for path in (root / "ecgen-radiology").iterdir():
        path.unlink()
    return archive


@pytest.mark.parametrize("put", [unpacked, packed])
def test_reports_in_order_of_their_numbers(root: Path, put) -> None:
    put(root)
    found = list(read(root, OpenIOptions()))
    assert [one.id for one in found] == ["CXR2", "CXR2", "CXR3", "4", "5", "CXR10"]
    missing, two, none, bad, nameless, ten = found
    assert isinstance(two, Study) and isinstance(ten, Study)
    assert (two.patient_id, two.source, two.split) == ("CXR2", "open-i", split_of("CXR2"))
    assert [image.pixels for image in ten.images] == [root / f"NLMCXR_png/CXR10_IM-{n}.png" for n in (2, 1)]
    assert ten.report == "FINDINGS: Heart normal, p < 1.\nIMPRESSION: Clear."
    assert prepare_report(two.report, ReportOptions()) == "Lungs clear."
    assert missing == Skipped("CXR2", "CXR2_IM-7.png", "the image is missing")
    assert none == Skipped("CXR3", "", "it names no image")
    assert isinstance(bad, Skipped) and bad.reason.startswith("not XML (no element found")
    assert isinstance(nameless, Skipped) and nameless.reason == "no uId in it"


def test_views_of_a_table(root: Path) -> None:
    unpacked(root)
    with pytest.raises(UserError, match=r"--views PA: nlmcxr_dicom_metadata.csv.gz is not in"):
        list(read(root, OpenIOptions(views=("PA",))))
    lines = "imageid,View Position\nCXR10_IM-1,PA\nCXR10_IM-2,LL\nCXR2_IM-1,\n"
    (root / open_i.VIEWS).write_bytes(gzip.compress(lines.encode()))
    every = {s.id: [image.view for image in s.images] for s in read(root, OpenIOptions()) if isinstance(s, Study)}
    assert every == {"CXR2": [""], "CXR10": ["LATERAL", "PA"]}
    frontal = list(read(root, OpenIOptions(views=("PA", "AP"))))
    assert [s.id for s in frontal if isinstance(s, Study)] == ["CXR10"]
    assert Skipped("CXR2", "", "no image of the views PA, AP") in frontal


def test_what_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no reports \(\*.xml or NLMCXR_reports.tgz\).*torchxrayvision==1.5.7"):
        list(read(root, OpenIOptions()))
    archive = packed(root)
    assert len(list(read(root, OpenIOptions(reports=str(archive))))) == 6
    archive.write_bytes(archive.read_bytes()[:300])
    with pytest.raises(UserError, match=r"NLMCXR_reports.tgz: the archive is damaged or incomplete"):
        list(read(root, OpenIOptions()))
    with pytest.raises(UserError, match=r"--reports .*nowhere: no such"):
        list(read(root, OpenIOptions(reports=str(root / "nowhere"))))
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=r"no PNG in it; unpack NLMCXR_png.tgz"):
        list(read(root / "empty", OpenIOptions()))
    with pytest.raises(UserError, match=r"no such folder"):
        list(read(root / "nowhere", OpenIOptions()))


def test_the_real_archive(tmp_path: Path) -> None:
    """Of an installed torchxrayvision: 3,955 reports, of which 104 name no image."""
    if file_of("torchxrayvision", f"data/{open_i.REPORTS}") is None:
        pytest.skip("torchxrayvision is not installed")
    for name in ("CXR1_1_IM-0001-3001", "CXR1_1_IM-0001-4001"):
        PIL.Image.new("L", (40, 40), 99).save(tmp_path / f"{name}.png")
    found = list(read(tmp_path, OpenIOptions()))
    (first,) = (s for s in found if isinstance(s, Study))
    assert first.id == "CXR1" and len(first.images) == 2
    text = prepare_report(first.report, ReportOptions())
    assert text.startswith("The cardiac silhouette and mediastinum size are within normal limits.")
    assert text.endswith("Normal chest x-.") or "XXXX" not in text
    assert sum(s.reason == "it names no image" for s in found if isinstance(s, Skipped)) == 104
    assert len({s.id for s in found}) == 3955
