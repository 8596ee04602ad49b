"""Real lung outlines: read from an archive of the shape that torchxrayvision has."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import PIL.Image
import PIL.ImageDraw
import pytest

from medim.data import outlines, phantom
from medim.errors import UserError


def png(*boxes: tuple[int, int, int, int]) -> bytes:
    image = PIL.Image.new("L", (400, 400))
    for box in boxes:
        PIL.ImageDraw.Draw(image).ellipse(box, fill=255)
    data = io.BytesIO()
    image.save(data, format="PNG")
    return data.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    package = tmp_path / "torchxrayvision"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    with zipfile.ZipFile(package / outlines.ARCHIVE, "w") as file:
        file.writestr("lungs/pair.png", png((60, 60, 180, 340), (220, 70, 340, 330)))
        file.writestr("lungs/one.png", png((60, 60, 180, 340)))
        file.writestr("lungs/stacked.png", png((100, 20, 300, 190), (100, 210, 300, 380)))
    monkeypatch.syspath_prepend(str(tmp_path))
    phantom._real_outlines.cache_clear()
    yield
    phantom._real_outlines.cache_clear()


def test_only_a_right_and_a_left_lung_make_a_pair(archive: None) -> None:
    (pair,) = outlines.lung_pairs(96)
    assert pair["right"].shape == (96, 96) and pair["right"].min() >= 0 and pair["right"].max() <= 1
    columns = [pair[side].sum(0).argmax() for side in ("right", "left")]
    assert columns[0] < 48 < columns[1]  # the patient's right is on the left of the picture


def test_the_phantom_is_drawn_in_real_outlines(archive: None) -> None:
    real, ellipse = (phantom.study(0, 3, "test", kind) for kind in ("real", "ellipse"))
    assert real.report == ellipse.report and real.images[0].pixels.tobytes() != ellipse.images[0].pixels.tobytes()


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outlines, "file_of", lambda package, name: None)
    with pytest.raises(UserError, match="pip install --no-deps torchxrayvision"):
        outlines.lung_pairs(96)
