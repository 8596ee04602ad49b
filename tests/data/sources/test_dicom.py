"""A tree of DICOM files: what becomes a study, what is skipped and why, and that no header enters anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

from medim.data.sources import SOURCES
from medim.data.sources.dicom import DicomOptions, read
from medim.data.studies import Skipped, Study
from medim.errors import UserError
from medim.pictures import read_picture
from medim.pictures.dicom import Frame

AXIAL, CORONAL, SAGITTAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]


def write(file: Path, value: int = 0, frames: int = 1, **tags: Any) -> Path:
    """A DICOM file of 4 x 6 pixels from `value` on; keywords are tags, None removes one."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ComputedRadiographyImageStorage, generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Rows, dataset.Columns, dataset.SamplesPerPixel = 4, 6, 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit, dataset.PixelRepresentation = 16, 16, 15, 0
    dataset.PixelData = (np.arange(24 * frames, dtype=np.uint16) + value).tobytes()
    if frames > 1:
        dataset.NumberOfFrames = frames
    own = {"Modality": "CR", "StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.1.1", "PatientID": "P1"}
    for tag, given in (own | {"SOPInstanceUID": generate_uid()} | tags).items():
        if given is None:
            if tag in dataset:
                delattr(dataset, tag)
        else:
            setattr(dataset, tag, given)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file


def listed(root: Path, **given: Any) -> tuple[list[Study], dict[str, str]]:
    """Studies, and the reason of every file that was skipped."""
    records = list(read(root, DicomOptions(**given)))
    assert [repr(one) for one in read(root, DicomOptions(**given))] == [repr(one) for one in records]
    return (
        [one for one in records if isinstance(one, Study)],
        {one.file: one.reason for one in records if isinstance(one, Skipped)},
    )


def test_files_of_one_study_are_one_study(tmp_path: Path) -> None:
    write(tmp_path / "b ä" / "IM1", ViewPosition="PA", PixelSpacing=[0.2, 0.2])
    write(tmp_path / "b ä" / "IM2.dcm", ViewPosition="LL", Modality="DX", SeriesInstanceUID="1.1.2")
    write(tmp_path / "a", StudyInstanceUID="1.2", ViewPosition="AP")
    write(tmp_path / "c", StudyInstanceUID="1.3", PatientID="P2", ViewPosition="HAND")
    (tmp_path / "notes.md").write_text("no DICOM, and none is expected")
    studies, skipped = listed(tmp_path)
    assert not skipped
    assert [(s.id, s.patient_id, s.source) for s in studies] == [
        ("study-00001", "patient-00001", "dicom"),
        ("study-00002", "patient-00002", "dicom"),
        ("study-00003", "patient-00001", "dicom"),
    ]
    assert [[(i.modality, i.view) for i in s.images] for s in studies] == [
        [("xray", "AP")],
        [("xray", "")],
        [("xray", "PA"), ("xray", "LATERAL")],
    ]
    assert studies[2].images[0].pixels == Frame(tmp_path / "b ä" / "IM1")
    assert studies[2].images[0].spacing == (0.2, 0.2) and studies[0].images[0].spacing is None
    assert np.asarray(read_picture(studies[0].images[0].pixels).image).ravel()[[0, -1]].tolist() == [0, 255]


def test_splits_go_by_patient(tmp_path: Path) -> None:
    for n in range(60):
        for k in range(2):
            write(tmp_path / f"{n:02d}-{k}", StudyInstanceUID=f"1.{n}.{k}", PatientID=f"P{n}")
    studies, _ = listed(tmp_path, validation=0.2, test=0.3)
    where = {s.patient_id: {o.split for o in studies if o.patient_id == s.patient_id} for s in studies}
    assert len(where) == 60 and all(len(splits) == 1 for splits in where.values())
    counted = {split: sum(splits == {split} for splits in where.values()) for split in ("train", "validation", "test")}
    assert counted["train"] > counted["test"] > 8 and counted["validation"] > 4
    (tmp_path / "00-0").unlink()  # one file less moves nobody to another split
    fewer, _ = listed(tmp_path, validation=0.2, test=0.3)
    assert [s.split for s in fewer] == [s.split for s in studies[1:]]


def stack(folder: Path, n: int, series: str = "1.1.1", **tags: Any) -> None:
    """Slices that are 5 mm apart, in files and with numbers that run the other way."""
    for i in range(n):
        place = {"ImageOrientationPatient": AXIAL, "ImagePositionPatient": [0, 0, 5 * i], "InstanceNumber": n - i}
        write(folder / f"{series}-{n - i:02d}", 100 * i, SeriesInstanceUID=series, **(place | tags))


def test_a_series_is_one_image_or_many_studies(tmp_path: Path) -> None:
    stack(tmp_path, 5, Modality="CT")
    stack(tmp_path, 3, "1.1.2", Modality="MR", SeriesDescription="t2_tse tra")
    write(tmp_path / "z", SeriesInstanceUID="1.1.3")
    (study,), _ = listed(tmp_path)
    assert [(i.modality, i.view) for i in study.images] == [("ct", "soft axial"), ("mri", "t2 axial"), ("xray", "")]
    files = [i.pixels for i in study.images]
    assert files[:2] == [Frame(tmp_path / "1.1.1-03", 0, "soft"), Frame(tmp_path / "1.1.2-02")]
    every, _ = listed(tmp_path, frames=2, window="50 350")
    assert [s.id for s in every] == [
        "study-00001",
        *(f"study-00001-0{k}" for k in ("1-000", "1-002", "1-004", "2-000", "2-002")),
    ]
    assert [len(s.images) for s in every] == [1] * 6
    assert every[1].images[0].pixels == Frame(tmp_path / "1.1.1-05", 0, "50 350")  # from the feet on
    assert len(listed(tmp_path, frames="all")[0]) == 9


def test_a_file_of_many_frames_is_a_series(tmp_path: Path) -> None:
    write(tmp_path / "m", frames=7, Modality="MR", SeriesDescription="FLAIR")
    (study,), _ = listed(tmp_path)
    assert study.images[0].pixels == Frame(tmp_path / "m", 3) and study.images[0].view == "flair"
    apart, _ = listed(tmp_path, frames=3)
    assert [s.images[0].pixels for s in apart] == [Frame(tmp_path / "m", k) for k in (1, 4)]


@pytest.mark.parametrize(
    ("said", "axes", "view"),
    [
        ("T1 MPRAGE sag", SAGITTAL, "t1 sagittal"),
        ("t1_se_tra post GD", AXIAL, "t1ce axial"),
        ("T2 FLAIR cor", CORONAL, "flair coronal"),
        ("t2_tirm_dark-fluid", AXIAL, "flair axial"),
        ("PD TSE", AXIAL, "pd axial"),
        ("ep2d DWI t2*", AXIAL, "axial"),
        ("Patient DOE abdomen", None, ""),
    ],
)
def test_views_are_words_of_a_fixed_list(tmp_path: Path, said: str, axes: list[int] | None, view: str) -> None:
    write(tmp_path / "m", Modality="MR", SeriesDescription=said, ImageOrientationPatient=axes)
    assert listed(tmp_path)[0][0].images[0].view == view


def test_contrast_makes_t1_t1ce(tmp_path: Path) -> None:
    write(tmp_path / "m", Modality="MR", SeriesDescription="t1", ContrastBolusAgent="Gadovist for DOE^JOHN")
    assert listed(tmp_path)[0][0].images[0].view == "t1ce"


def test_reports_lie_beside_images(tmp_path: Path) -> None:
    write(tmp_path / "a" / "1.dcm", StudyInstanceUID="1.1")
    write(tmp_path / "a" / "2.dcm", StudyInstanceUID="1.1")
    (tmp_path / "a" / "2.txt").write_text("by stem\n")
    write(tmp_path / "b" / "x" / "IM1", StudyInstanceUID="1.2")
    write(tmp_path / "b" / "y" / "IM1", StudyInstanceUID="1.2")
    (tmp_path / "b" / "any.txt").write_text("\ufeffonly text of its folder: größer")
    write(tmp_path / "c" / "IM1", StudyInstanceUID="1.3")
    (tmp_path / "c.txt").write_text("named like the folder")
    write(tmp_path / "d" / "IM1", StudyInstanceUID="1.4")
    write(tmp_path / "d" / "IM2", StudyInstanceUID="1.5")
    (tmp_path / "d" / "whose.txt").write_text("of one of two studies: nobody can say")
    (tmp_path / "d" / "IM2.txt").write_text("by whole name")
    write(tmp_path / "e" / "IM1", StudyInstanceUID="1.6")
    (tmp_path / "e.txt").write_bytes("größer".encode("latin-1"))
    studies, skipped = listed(tmp_path)
    assert [s.report for s in studies] == [
        "by stem", "only text of its folder: größer", "named like the folder", "", "by whole name", "größer",
    ]  # fmt: skip
    assert not skipped


def test_what_is_no_image_is_skipped_with_its_reason(tmp_path: Path) -> None:
    write(tmp_path / "good", SOPInstanceUID="1.9.9")
    write(tmp_path / "copy2", SOPInstanceUID="1.9.9")
    write(tmp_path / "us", Modality="US")
    write(tmp_path / "sr", Modality="SR", Rows=None)
    write(tmp_path / "odd", Modality="DOE")
    write(tmp_path / "dry", Rows=None)
    write(tmp_path / "scout", Modality="CT", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write(tmp_path / "screen", Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7")
    write(tmp_path / "burned", BurnedInAnnotation="YES")
    write(tmp_path / "lost", StudyInstanceUID=None)
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "torn.dcm").write_bytes((tmp_path / "good").read_bytes()[:140])
    write(tmp_path / ".hidden")
    studies, skipped = listed(tmp_path)
    assert len(studies) == 1
    told = {
        "good": "same image", "us": "ultrasound", "sr": r"put its text beside", "odd": "none of CR, DX, CT, MR",
        "dry": "no pixels", "scout": "localizer", "lost": "which study", "screen": "secondary capture",
        "burned": "burned into", "text.dcm": "no DICOM", "torn.dcm": "",
    }  # fmt: skip
    assert skipped.keys() == told.keys() and all(words in skipped[name] for name, words in told.items())
    with pytest.raises(UserError, match="no such folder"):
        listed(tmp_path / "none")


PRIVATE = {
    "LO": ["PatientID", "IssuerOfPatientID", "InstitutionalDepartmentName", "StudyID", "SeriesDescription"],
    "PN": ["PatientName", "ReferringPhysicianName", "OperatorsName", "PerformingPhysicianName"],
    "other": ["StudyDescription", "ProtocolName", "AccessionNumber", "InstitutionName", "ImageComments"],
    "more": ["PatientComments", "PatientAddress", "ContrastBolusAgent", "SequenceName", "StationName", "ViewPosition"],
}
DATES = ["StudyDate", "SeriesDate", "AcquisitionDate", "ContentDate", "PatientBirthDate", "InstanceCreationDate"]


def strings(record: Any) -> Iterator[str]:
    """All that a record says, but for where the files are."""
    if isinstance(record, Skipped):
        yield record.reason
        return
    yield from (record.id, record.patient_id, record.report, record.prompt, record.split, record.source)
    for image in record.images:
        yield from (image.modality, image.view, repr(image.spacing), str(image.pixels.window))
        yield repr(read_picture(image.pixels).window)


@pytest.mark.parametrize("modality", ["CR", "CT", "MR", "SR"])
def test_no_name_id_date_or_free_text_of_a_header_enters(tmp_path: Path, modality: str) -> None:
    secret = {tag: "XJOHNDOEX" for tags in PRIVATE.values() for tag in tags} | {tag: "19470213" for tag in DATES}
    uids = {
        "StudyInstanceUID": "1.2.47110815.1",
        "SeriesInstanceUID": "1.2.47110815.2",
        "SOPInstanceUID": "1.2.47110815.3",
    }
    private = [Dataset()]
    private[0].TextValue = "XJOHNDOEX"
    write(tmp_path / "f", Modality=modality, RequestAttributesSequence=private, **secret, **uids)
    broken = write(tmp_path / "g", Modality=modality, **(secret | uids | {"SOPInstanceUID": "1.2.47110815.4"}))
    broken.write_bytes(
        broken.read_bytes().replace(b"\x28\x00\x10\x00US\x02\x00\x04", b"\x28\x00\x10\x00US\x02\x00\x00")
    )
    write(tmp_path / "h", Modality="XJOHNDOEX", **secret, **uids)
    records = list(read(tmp_path, DicomOptions()))
    assert len(records) >= 2 and any(isinstance(one, Study) for one in records) == (modality != "SR")
    said = " | ".join(text for one in records for text in strings(one))
    for word in ("JOHN", "DOE", "1947", "47110815"):
        assert word not in said.upper()


def test_options_are_checked() -> None:
    for given, words in (
        ({"window": "liver"}, "window 'liver'"),
        ({"frames": 0}, "frames=0"),
        ({"test": 1.0}, "leave some"),
        ({"validation": -0.1}, "leave some"),
    ):
        with pytest.raises(UserError, match=words):
            DicomOptions(**given)  # type: ignore[arg-type]
    assert SOURCES["dicom"].read is read and SOURCES["dicom"].options is DicomOptions


def test_pydicoms_own_files(tmp_path: Path) -> None:
    for name in ("CT_small.dcm", "MR_small.dcm", "rtplan.dcm"):
        file = get_testdata_file(name, download=False)
        assert file is not None
        (tmp_path / name).write_bytes(Path(file).read_bytes())
    studies, skipped = listed(tmp_path)
    assert [[(i.modality, i.view) for i in s.images] for s in studies] == [[("ct", "soft axial")], [("mri", "axial")]]
    assert list(skipped) == ["rtplan.dcm"]
