"""Regions of a tiled TIFF made from the shipped CC0 slide."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import tifffile

from medim.errors import UserError
from medim.pictures import read_picture
from medim.pictures.slide import Region
from medim.pipeline import ASSETS

pytest.importorskip("openslide")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A tiled TIFF of 0.5 and 0.25 micrometres per row and column, and its pixels."""
    with PIL.Image.open(ASSETS / "pathology" / "test.jpg") as image:
        pixels = np.asarray(image.convert("RGB"))[:300, :400]
    file = tmp_path_factory.mktemp("slides") / "a slide ä.tif"
    tifffile.imwrite(
        file, pixels, tile=(64, 64), photometric="rgb", resolution=(40000, 20000), resolutionunit="CENTIMETER"
    )
    return file, pixels


def test_a_region_is_its_pixels(slide: tuple[Path, np.ndarray]) -> None:
    file, pixels = slide
    region = Region(file, 30, 100, 96)
    picture = region.load()
    np.testing.assert_array_equal(np.asarray(picture.image), pixels[100:196, 30:126])
    assert picture.image.mode == "RGB" and picture.spacing == pytest.approx((0.0005, 0.00025))
    assert region.file == file and pickle.loads(pickle.dumps(region)) == region
    again = read_picture(Region(file, 400 - 96, 300 - 96, 96)).image
    np.testing.assert_array_equal(np.asarray(again), pixels[-96:, -96:])


@pytest.mark.parametrize("place", [(-1, 0), (0, -1), (305, 0), (0, 205)])
def test_outside(slide: tuple[Path, np.ndarray], place: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"are not inside its 400x300"):
        Region(slide[0], *place, 96).load()


def test_bad_files(slide: tuple[Path, np.ndarray], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.svs does not exist"):
        Region(tmp_path / "gone.svs", 0, 0, 8).load()
    (tmp_path / "text.svs").write_text("no slide")
    with pytest.raises(UserError, match=r"cannot be read as a slide"):
        Region(tmp_path / "text.svs", 0, 0, 8).load()
    torn = tmp_path / "torn.tif"
    torn.write_bytes(slide[0].read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"torn.tif"):
        Region(torn, 0, 0, 200).load()
    with pytest.raises(UserError, match=r"torn.tif"):  # and again, from a new handle
        Region(torn, 0, 0, 200).load()
