"""Frames of DICOM files: every step from stored values to 8 bits, on files written here and on real ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, generate_uid

from medim.errors import UserError
from medim.pictures import Pixels, read_picture
from medim.pictures.dicom import Frame, is_dicom

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a DICOM file of stored values; keywords are tags."""

    def write(values: Any, name: str = "file", syntax: str = ExplicitVRLittleEndian, **tags: Any) -> Path:
        array = np.asarray(values)
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = syntax
        dataset = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        colours = array.ndim >= 3 and array.shape[-1] == 3
        frames = array.ndim - (3 if colours else 2)
        dataset.Rows, dataset.Columns = array.shape[frames : frames + 2]
        dataset.SamplesPerPixel = 3 if colours else 1
        dataset.PhotometricInterpretation = "RGB" if colours else "MONOCHROME2"
        dataset.BitsAllocated = dataset.BitsStored = array.dtype.itemsize * 8
        dataset.HighBit = dataset.BitsStored - 1
        dataset.PixelRepresentation = int(array.dtype.kind == "i")
        if colours:
            dataset.PlanarConfiguration = 0
        if frames:
            dataset.NumberOfFrames = len(array)
        dataset.PixelData = array.tobytes() + b"\0" * (array.nbytes % 2)
        for tag, value in tags.items():
            if value is None:
                delattr(dataset, tag)
            else:
                setattr(dataset, tag, value)
        dataset.save_as(tmp_path / name, enforce_file_format=True)
        return tmp_path / name

    return write


def row(values: list[int], dtype: Any = np.int16) -> np.ndarray:
    return np.array([values, values], dtype=dtype)


def shown(file: Path, **given: Any) -> list[int]:
    return np.asarray(Frame(file, **given).load().image)[0].tolist()


def item(**tags: Any) -> Dataset:
    made = Dataset()
    for tag, value in tags.items():
        setattr(made, tag, value)
    return made


def test_a_ct_is_windowed_in_hu(write: Write) -> None:
    """HU = 2 stored - 1000; soft tissue is -160 to 240, so 44 HU is 204 / 400 of 255."""
    file = write(row([420, 522, 620, 500, 0, 2000]), Modality="CT", RescaleSlope=2, RescaleIntercept=-1000)
    assert shown(file, window="soft") == [0, 130, 255, 102, 0, 255]
    assert shown(file) == shown(file, window="soft") == shown(file, window="40 400")  # the file asks for none
    assert Frame(file).load().window == "hu -160 240"
    assert Frame(file, window="lung").load().window == "hu -1350 150"
    assert Frame(file, window="brain").load().window == "hu 0 80"
    assert Frame(file, window="bone").load().window == "hu -500 1300"
    for wrong in ("liver", "40", "40 0", "40 -5", "1 2 3", "nan 5"):
        with pytest.raises(UserError, match=r"window '.*': "):
            Frame(file, window=wrong).load()


def test_the_first_window_of_the_file_counts(write: Write) -> None:
    """Centre 100.5 and width 201 by the standard's formula: from 0 to 200; exactly, from 0 to 201."""
    values = row([-5, 0, 50, 102, 200, 201])
    file = write(values, Modality="MR", WindowCenter=[100.5, 7], WindowWidth=[201, 3])
    assert shown(file) == [0, 0, 64, 130, 255, 255] and Frame(file).load().window == "window 0 200"
    exact = write(values, Modality="MR", WindowCenter=100.5, WindowWidth=201, VOILUTFunction="LINEAR_EXACT")
    assert shown(exact) == [0, 0, 63, 129, 254, 255] and Frame(exact).load().window == "window 0 201"
    curved = write(values, Modality="MR", WindowCenter=100, WindowWidth=200, VOILUTFunction="SIGMOID")
    expected = [255 / (1 + np.exp(-4 * (v - 100) / 200)) for v in (-5, 0, 50, 102, 200, 201)]
    assert shown(curved) == [round(float(v)) for v in expected]
    none = write(values, Modality="MR", WindowCenter=100, WindowWidth=0)
    assert Frame(none).load().window == "range -5 201"
    with pytest.raises(UserError, match="window lung is one of CT"):
        Frame(file, window="lung").load()


def test_without_a_window_values_are_stretched_and_padding_is_black(write: Write) -> None:
    values = row([-2000, 0, 10, 20, -2000, 5])
    tags = {"Modality": "CR", "PixelPaddingValue": -2000}
    assert shown(write(values, **tags)) == [0, 0, 128, 255, 0, 64]
    assert shown(write(values, PhotometricInterpretation="MONOCHROME1", **tags)) == [0, 255, 127, 0, 0, 191]
    assert shown(write(values, PixelPaddingRangeLimit=0, **tags)) == [0, 0, 85, 255, 0, 0]  # now 5 is the least


def test_monochrome1_is_inverted_after_its_window(write: Write) -> None:
    tags = {"WindowCenter": 50.5, "WindowWidth": 101, "Modality": "DX"}
    plain = shown(write(row([0, 25, 100, 300], np.uint16), **tags))
    assert plain == [0, 64, 255, 255]
    inverted = shown(write(row([0, 25, 100, 300], np.uint16), PhotometricInterpretation="MONOCHROME1", **tags))
    assert inverted == [255, 191, 0, 0]


def test_tables_of_modality_and_voi(write: Write) -> None:
    """Stored 1, 2, 3 -> 10, 30, 20 by the modality's table; 10 and below -> 0, 11 -> 17 ... by the other's (8 bits)."""
    modality = item(LUTDescriptor=[3, 1, 16], LUTData=np.array([10, 30, 20], np.uint16).tobytes(), ModalityLUTType="US")
    voi = item(LUTDescriptor=[4, 10, 8], LUTData=np.array([0, 17, 34, 51], np.uint16).tobytes())
    file = write(row([1, 2, 3, 9], np.uint16), Modality="CR", ModalityLUTSequence=[modality])
    assert shown(file) == [0, 255, 128, 128] and Frame(file).load().window == "range 10 30"
    file = write(row([9, 10, 11, 12, 500], np.uint16), Modality="CR", VOILUTSequence=[voi])
    assert shown(file) == [0, 0, 17, 34, 51] and Frame(file).load().window == "voi lut"


@pytest.mark.parametrize(("bits", "dtype", "top"), [(8, np.uint8, 255), (12, np.uint16, 4095), (12, np.int16, 2047)])
def test_stored_bits_and_signs(write: Write, bits: int, dtype: Any, top: int) -> None:
    low = 0 if np.dtype(dtype).kind == "u" else -top - 1
    file = write(row([low, top], dtype), BitsStored=bits, HighBit=bits - 1, Modality="CR")
    assert shown(file) == [0, 255] and Frame(file).load().window == f"range {low} {top}"


def test_frames_are_told_apart_and_may_have_values_of_their_own(write: Write) -> None:
    frames = np.stack([row([0, 100]), row([0, 100])])
    groups = [
        item(
            FrameVOILUTSequence=[item(WindowCenter=centre, WindowWidth=101)],
            PixelValueTransformationSequence=[item(RescaleSlope=1, RescaleIntercept=shift, RescaleType="US")],
        )
        for centre, shift in ((50.5, 0), (100.5, 50))
    ]
    shared = [item(PixelMeasuresSequence=[item(PixelSpacing=[0.5, 0.5])])]
    tags = {"PerFrameFunctionalGroupsSequence": groups, "SharedFunctionalGroupsSequence": shared, "Modality": "MR"}
    file = write(frames, **tags)
    assert [Frame(file, i).load().window for i in (0, 1)] == ["window 0 100", "window 50 150"]
    assert shown(file, index=0) == shown(file, index=1) == [0, 255]
    assert Frame(file, 1).load().spacing == (0.5, 0.5)
    for index in (2, -1):
        with pytest.raises(UserError, match=f"has 2 frames: there is no frame {index}"):
            Frame(file, index).load()
    plain = write(np.stack([row([0, 9]), row([7, 3])]), Modality="MR")
    assert shown(plain) == [0, 255] and shown(plain, index=1) == [255, 0]


def test_colours(write: Write) -> None:
    values = np.array([[[200, 30, 60], [0, 0, 255]]] * 2, np.uint8)
    picture = Frame(write(values, Modality="US")).load()
    assert picture.image.mode == "RGB" and np.array_equal(picture.image, values) and picture.window == ""
    wide = Frame(write(values.astype(np.uint16) * 256, Modality="US")).load()
    assert np.array_equal(wide.image, values) and wide.window == "range 0 65535"
    ybr = np.array([[[76, 85, 255], [29, 255, 107]]] * 2, np.uint8)  # red and blue by PS3.3 C.7.6.3.1.2
    red, blue = np.asarray(Frame(write(ybr, PhotometricInterpretation="YBR_FULL")).load().image)[0].astype(int)
    assert np.abs(red - [254, 0, 0]).max() < 3 and np.abs(blue - [0, 0, 254]).max() < 3
    table = np.array([0, 255, 128, 9], np.uint8).tobytes()
    described = {f"{c}PaletteColorLookupTableDescriptor": [4, 0, 8] for c in ("Red", "Green", "Blue")}
    data = {f"{c}PaletteColorLookupTableData": table for c in ("Red", "Blue")}
    data["GreenPaletteColorLookupTableData"] = bytes(4)
    palette = write(row([0, 1, 2, 0], np.uint8), PhotometricInterpretation="PALETTE COLOR", **described, **data)
    assert np.asarray(Frame(palette).load().image)[0].tolist() == [[0, 0, 0], [255, 0, 255], [128, 0, 128], [0, 0, 0]]


def test_spacing_and_square_pixels(write: Write) -> None:
    values = np.tile(np.arange(10, dtype=np.int16), (6, 1))
    assert Frame(write(values, PixelSpacing=[0.2, 0.2], ImagerPixelSpacing=[1, 1])).load().spacing == (0.2, 0.2)
    assert Frame(write(values, ImagerPixelSpacing=[0.1, 0.1])).load().spacing == (0.1, 0.1)
    assert Frame(write(values)).load().spacing is None
    assert Frame(write(values, PixelSpacing=[0, 0.2])).load().spacing is None
    tall = Frame(write(values, PixelSpacing=[3, 1])).load()  # 6 rows of 3 mm: 18 mm high, 10 mm wide
    assert tall.image.size == (10, 18) and tall.spacing == (1, 1)
    with pytest.raises(UserError, match=r"0\.01 x 3 mm cannot be right"):
        Frame(write(values, PixelSpacing=[0.01, 3])).load()


def test_a_path_is_dicom_by_its_content(write: Write, tmp_path: Path) -> None:
    file = write(np.arange(256, dtype=np.int16).reshape(16, 16), name="IM 0001 ö", Modality="CR")
    assert is_dicom(file) and isinstance(Frame(file), Pixels)
    assert read_picture(file).image.tobytes() == Frame(file).load().image.tobytes() == bytes(range(256))
    (tmp_path / "fake.dcm").write_bytes(b"no DICOM")
    assert not is_dicom(tmp_path / "fake.dcm") and not is_dicom(tmp_path)
    with pytest.raises(UserError, match=r"fake.dcm cannot be read"):
        read_picture(tmp_path / "fake.dcm")


def test_files_that_hold_no_picture(write: Write, tmp_path: Path) -> None:
    values = row([1, 2, 3, 4])
    file = write(values)
    (tmp_path / "torn").write_bytes(file.read_bytes()[:-5])
    (tmp_path / "header").write_bytes(file.read_bytes()[:200])
    for bad, words in (
        (write(values, "a", PixelData=None), "holds no pixels: leave it out"),
        (write(values, "b", Rows=None), "holds no pixels: leave it out"),
        (tmp_path / "torn", "pixels are damaged or incomplete$"),
        (tmp_path / "header", "a|header"),
        (write(values, "c", PhotometricInterpretation=None), "the header does not say how|damaged"),
        (write(row([7, 7]), "d", Modality="CR"), "one value everywhere"),
        (tmp_path / "none", "none does not exist"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            Frame(bad).load()
        assert "\n" not in str(caught.value)


def test_a_missing_decoder_is_named(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEGLSLosslessDecoder

    monkeypatch.setattr(JPEGLSLosslessDecoder, "_available", {})
    file = tmp_path / "ls"
    dataset = pydicom.dcmread(write(row([1, 2])))
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = pydicom.encaps.encapsulate([b"\0\0"])
    dataset.save_as(file)
    with pytest.raises(UserError, match=r"JPEG-LS Lossless Image Compression needs a decoder: pip install python-gdcm"):
        Frame(file).load()
    dataset.file_meta.TransferSyntaxUID = JPEG2000Lossless
    dataset.save_as(file)
    with pytest.raises(UserError, match=r"damaged or incomplete, or JPEG 2000 .* needs another decoder"):
        Frame(file).load()


def test_a_message_quotes_no_header(write: Write) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = write(row([1, 2]), RescaleSlope=1, PatientName="DOE^JOHN")
        raw = file.read_bytes().replace(b"S\x10DS\x04\x001.0 ", b"S\x10DS\x04\x00JDOE")
        file.write_bytes(raw)
    assert b"JDOE" in raw
    try:
        picture = Frame(file).load()
    except UserError as error:
        assert "JD" not in str(error)
    else:  # a value that cannot be read counts as absent
        assert "JD" not in picture.window


# --------------------------------------------------------------------------------------------------- real files


@pytest.mark.parametrize(
    ("name", "size", "window", "spacing"),
    [
        ("CT_small.dcm", (128, 128), "hu -160 240", (0.661468, 0.661468)),
        ("MR_small.dcm", (64, 64), "window -200 1399", (0.3125, 0.3125)),
        ("693_J2KI.dcm", (512, 512), "hu -10 89", (0.478516, 0.478516)),
        ("SC_rgb_rle.dcm", (100, 100), "", (1.0, 1.0)),
    ],
)
def test_pydicoms_own_files(name: str, size: tuple[int, int], window: str, spacing: tuple[float, float]) -> None:
    file = get_testdata_file(name, download=False)
    assert file is not None
    picture = read_picture(Path(file))
    assert picture.image.size == size and picture.window == window and picture.spacing == spacing


def test_one_picture_in_five_encodings() -> None:
    made = []
    for kind in ("", "_RLE", "_bigendian", "_implicit", "_jp2klossless"):
        file = get_testdata_file(f"MR_small{kind}.dcm", download=False)
        assert file is not None
        made.append(read_picture(Path(file)).image.tobytes())
    assert len(set(made)) == 1


def test_a_real_chest_radiograph() -> None:
    """Lungs darker than the mediastinum between them, air around the neck darker than both."""
    pytest.importorskip("data_store", reason="pip install --no-deps pydicom-data==1.0.0")
    file = get_testdata_file("RG1_UNCR.dcm", download=False)
    assert file is not None
    image = np.asarray(read_picture(Path(file)).image, dtype=float)
    assert image.shape == (1955, 1841)
    lungs = image[600:1000, 400:650].mean(), image[600:1000, 1150:1350].mean()
    assert max(lungs) + 30 < image[600:1000, 850:950].mean()
