"""Pictures of any mode to 8 bits, prepared by cropping or padding: values by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

from medim.errors import UserError
from medim.pictures import read_picture
from medim.tokenization.image import prepare_image


def test_sixteen_bits_are_stretched_from_their_own_ends(tmp_path: Path) -> None:
    values = np.full((9, 9), 100, np.uint16)
    values[0, :3] = 4100, 1100, 2100  # 1, 1/4 and 1/2 of the range
    PIL.Image.fromarray(values).save(tmp_path / "ä b.png")
    picture = read_picture(tmp_path / "ä b.png")
    assert picture.image.mode == "L" and picture.window == "range 100 4100"
    assert np.asarray(picture.image)[0].tolist() == [255, 64, 128] + [0] * 6  # 63.75 and 127.5, which rounds to even


def test_floats_and_bits_and_eight_bits(tmp_path: Path) -> None:
    values = np.linspace(-1, 1, 81, dtype=np.float32).reshape(9, 9)
    PIL.Image.fromarray(values).save(tmp_path / "f.tiff")
    picture = read_picture(tmp_path / "f.tiff")
    assert np.asarray(picture.image)[4, 4] == 128 and picture.window == "range -1 1"
    plain = PIL.Image.fromarray(np.arange(81, dtype=np.uint8).reshape(9, 9))
    same = read_picture(plain)
    assert same.image.tobytes() == plain.tobytes() and same.window == "" and same.spacing is None
    assert read_picture(plain.point(lambda v: v > 40, mode="1")).image.getextrema() == (0, 255)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA"])
def test_colours_become_rgb(mode: str) -> None:
    image = PIL.Image.new("RGB", (9, 9), (200, 30, 60))
    if mode == "PA":
        image = image.convert("P")
    made = read_picture(image.convert(mode)).image
    assert made.mode == "RGB"
    if mode in ("RGB", "RGBA", "CMYK"):
        assert made.getpixel((4, 4)) == (200, 30, 60)


def test_modes_without_a_way_to_rgb_are_named() -> None:
    with pytest.raises(UserError, match="mode La"):
        read_picture(PIL.Image.new("LA", (9, 9)).convert("La"))


def test_half_transparent_pixels_lie_on_the_backdrop() -> None:
    glass = PIL.Image.new("RGBA", (9, 9), (200, 100, 0, 51))  # a fifth of it
    assert read_picture(glass).image.getpixel((0, 0)) == (244, 224, 204)
    assert read_picture(glass, "black").image.getpixel((0, 0)) == (40, 20, 0)


def test_turned_pictures_stand_upright(tmp_path: Path) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    image = PIL.Image.new("L", (20, 10))
    image.putpixel((0, 9), 255)  # below left; turned clockwise, above left
    image.save(tmp_path / "t.png", exif=exif)
    made = read_picture(tmp_path / "t.png").image
    assert made.size == (10, 20) and made.getpixel((0, 0)) == 255


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    PIL.Image.effect_noise((90, 90), 50).save(tmp_path / "torn.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "torn.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "brain.nii.gz").write_bytes(b"x")
    PIL.Image.new("L", (1, 1)).save(tmp_path / "dot.png")
    for name, words in (
        ("torn.jpg", "torn.jpg cannot be read as an image .*truncated"),
        ("empty.png", "empty.png cannot be read"),
        ("brain.nii.gz", "is a volume"),
        ("none.png", "none.png does not exist"),
        ("dot.png", "dot.png is 1x1 pixels: the shorter side must have 8"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            prepare_image(tmp_path / name, 32)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="image is 400x1 pixels"):
        prepare_image(PIL.Image.new("L", (400, 1)), 32)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("size", [(32, 32), (70, 41), (30, 200)])
def test_cropping_is_that_of_pil(mode: str, size: tuple[int, int]) -> None:
    """What models were trained with: it must never change by a bit."""
    image = PIL.Image.effect_noise(size, 80).convert(mode)
    expected = PIL.ImageOps.fit(image.convert("RGB"), (32, 32), method=PIL.Image.Resampling.BICUBIC)
    for gray in (False, True):
        assert prepare_image(image, 32, gray).tobytes() == expected.tobytes()
    assert prepare_image(image, 32).tobytes() == prepare_image(image, 32, fit="crop").tobytes()


@pytest.mark.parametrize(
    ("size", "box"), [((64, 32), (0, 8, 32, 24)), ((32, 64), (8, 0, 24, 32)), ((40, 40), (0, 0, 32, 32))]
)
def test_padding_keeps_the_whole_picture(size: tuple[int, int], box: tuple[int, int, int, int]) -> None:
    image = PIL.Image.new("RGB", size, (90, 90, 90))
    for gray, border in ((True, 0), (False, 255)):
        made = np.asarray(prepare_image(image, 32, gray, "pad"))
        expected = np.full((32, 32, 3), border)
        expected[box[1] : box[3], box[0] : box[2]] = 90
        assert (made == expected).all()
    thin = np.asarray(prepare_image(PIL.Image.new("L", (5000, 8), 90), 32, True, "pad"))
    assert (thin[15] == 90).all() and not np.delete(thin, 15, 0).any()


def test_a_prepared_picture_is_left_alone() -> None:
    image = PIL.Image.effect_noise((70, 41), 80)
    for gray in (False, True):
        once = prepare_image(image, 32, gray, "pad")
        assert prepare_image(once, 32, gray, "pad").tobytes() == once.tobytes()
