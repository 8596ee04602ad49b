"""Measured figures of pictures against what their texts say."""

from __future__ import annotations

import math
from dataclasses import replace

import PIL.Image
import pytest

from eval.measure import READERS, cellularity_rho
from eval.outputs import predicted_side
from eval.protocol import DataOptions, Protocol
from eval.studies import drawn, read_studies
from medim.data import pathology
from medim.errors import UserError


@pytest.fixture(scope="module")
def tiles():
    studies = [pathology.study(0, index, "test") for index in range(24)]
    return [pathology.parse(study.report) for study in studies], [study.images[0].pixels for study in studies]


def test_real_tiles_have_the_cellularity_that_is_told(tiles):
    told, pictures = tiles
    rho, n = cellularity_rho(told, pictures)
    assert n == 24 and rho > 0.8  # three bands tie many ranks
    low, _, high = pathology.FINDINGS[:3]
    reversed_ = [one | {low: one[high], high: one[low]} for one in told]
    assert cellularity_rho(reversed_, pictures)[0] == pytest.approx(-rho)


def test_studies_are_drawn_as_large_as_what_is_scored(tmp_path):
    protocol = Protocol(domains=("pathology",), tasks=("image",))
    assert drawn(protocol) == 96 and drawn(protocol, 128) == 128
    said = replace(protocol, data=DataOptions(options={"pixels": 64}))
    assert drawn(said, 128) == 64
    assert [one.images[0].pixels.size for one in read_studies(said, "test", 2)["pathology"]] == [(64, 64)] * 2
    with pytest.raises(UserError, match=r"data.options.lungs: of the embedded studies only pixels is chosen here"):
        drawn(replace(protocol, data=DataOptions(options={"lungs": "real"})))
    assert predicted_side(tmp_path) is None
    (tmp_path / "a.png").write_bytes(b"broken")
    (tmp_path / "b").mkdir()
    PIL.Image.new("L", (130, 128)).save(tmp_path / "b" / "c.png")
    assert predicted_side(tmp_path) == 128


def test_larger_tiles_are_measured_as_they_are():
    """Not shrunk, which would make nuclei smaller than the smoothing expects."""
    studies = [pathology.study(0, index, "test", 128) for index in range(12)]
    read = READERS["pathology"]([study.images[0].pixels for study in studies])
    assert read == [pathology.parse(study.report) for study in studies]


def test_what_has_no_picture_or_not_one_band_is_left_out(tiles):
    told, pictures = tiles
    assert cellularity_rho(told, [None, *pictures[1:]])[1] == 23
    assert cellularity_rho([dict.fromkeys(told[0], False), dict.fromkeys(told[0], True), *told[2:]], pictures)[1] == 22
    rho, n = cellularity_rho(told[:1] * 24, pictures)
    assert math.isnan(rho) and n == 24  # one band has no ranks
