"""MIMIC-CXR on a miniature of PhysioNet's tree: two subjects, four studies, tables plain and gzipped."""

from __future__ import annotations

import gzip
from pathlib import Path

import PIL.Image
import pytest

from medim.data.sources.mimic_cxr import MimicCxrOptions, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError

ROWS = (  # dicom, study, subject, split, view
    ("d3", "50000001", "10000032", "train", "LATERAL"),
    ("d2", "50000001", "10000032", "train", "AP"),
    ("d1", "50000001", "10000032", "train", "PA"),
    ("d4", "50000002", "10000032", "train", "LL"),
    ("d5", "50000003", "11000040", "validate", "PA"),
    ("d6", "50000004", "11000040", "test", "AP"),
)
REPORT = "FINDINGS: Heart normal.\n\n IMPRESSION: Clear."


@pytest.fixture(params=[True, False], ids=["gzipped", "plain"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    tables = {
        "split": ["dicom_id,study_id,subject_id,split", *(",".join(row[:4]) for row in ROWS)],
        "metadata": ["dicom_id,subject_id,study_id,ViewPosition", *(f"{r[0]},{r[2]},{r[1]},{r[4]}" for r in ROWS)],
    }
    for name, lines in tables.items():
        data, path = "\r\n".join(lines).encode(), tmp_path / f"mimic-cxr-2.0.0-{name}.csv"
        if request.param:
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
        else:
            path.write_bytes(b"\xef\xbb\xbf" + data)
    for dicom, study, subject, _, _ in ROWS:
        folder = tmp_path / "files" / f"p{subject[:2]}" / f"p{subject}" / f"s{study}"
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.new("L", (40, 40), 9).save(folder / f"{dicom}.jpg")
        folder.with_suffix(".txt").write_text(REPORT)
    return tmp_path


def test_studies_with_the_images_of_their_views(root: Path) -> None:
    one, lateral, three, four = read(root, MimicCxrOptions())
    assert isinstance(one, Study) and isinstance(three, Study) and isinstance(four, Study)
    assert (one.id, one.patient_id, one.split, one.report) == ("s50000001", "p10000032", "train", REPORT)
    assert [image.view for image in one.images] == ["PA", "AP"]
    assert one.images[0].pixels == root / "files/p10/p10000032/s50000001/d1.jpg"
    assert lateral == Skipped("s50000002", "files/p10/p10000032/s50000002", "no image of the views PA, AP")
    assert (three.split, four.split, four.patient_id) == ("validation", "test", "p11000040")


def test_views_and_images(root: Path) -> None:
    every = [s for s in read(root, MimicCxrOptions(views=("all",))) if isinstance(s, Study)]
    assert [[image.view for image in s.images] for s in every] == [["PA", "AP", "LATERAL"], ["LL"], ["PA"], ["AP"]]
    single = list(read(root, MimicCxrOptions(views=("LATERAL", "LL"), per_image=True)))
    assert [s.id for s in single if isinstance(s, Study)] == ["s50000001-d3", "s50000002-d4"]


def test_what_is_missing_is_named(root: Path) -> None:
    folder = root / "files" / "p10" / "p10000032"
    (folder / "s50000001" / "d2.jpg").unlink()
    (root / "files" / "p11" / "p11000040" / "s50000003.txt").unlink()
    skipped = [s for s in read(root, MimicCxrOptions()) if isinstance(s, Skipped)]
    assert [(s.id, s.file, s.reason) for s in skipped if "views" not in s.reason] == [
        ("s50000001", "files/p10/p10000032/s50000001/d2.jpg", "the image is missing"),
        ("s50000003", "files/p11/p11000040/s50000003.txt", "the report is missing"),
    ]
    (folder / "s50000001" / "d1.jpg").rename(folder / "s50000001" / "d1.dcm")
    (one, *_) = (s for s in read(root, MimicCxrOptions()) if isinstance(s, Study))
    assert [image.pixels for image in one.images] == [folder / "s50000001" / "d1.dcm"]


def test_reports_in_a_tree_of_their_own(root: Path, tmp_path: Path) -> None:
    for path in root.glob("files/p*/p*/s*.txt"):
        target = root / "mimic-cxr-reports" / path.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
    assert sum(isinstance(s, Study) for s in read(root, MimicCxrOptions())) == 3
    (root / "mimic-cxr-reports").rename(root / "texts")
    assert not any(isinstance(s, Study) for s in read(root, MimicCxrOptions()))
    assert sum(isinstance(s, Study) for s in read(root, MimicCxrOptions(reports=str(root / "texts")))) == 3


def test_tables_that_are_not_there(root: Path, tmp_path: Path) -> None:
    for path in root.glob("*.csv*"):
        path.unlink()
    with pytest.raises(UserError, match=r"mimic-cxr-2\.0\.0-metadata\.csv.*no such file; ROOT must hold"):
        list(read(root, MimicCxrOptions()))
    (root / "mimic-cxr-2.0.0-metadata.csv").write_text("dicom_id,View\nd1,PA\n")
    with pytest.raises(UserError, match="no column ViewPosition; there are dicom_id, View"):
        list(read(root, MimicCxrOptions()))
