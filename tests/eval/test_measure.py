"""Measured figures of pictures against what their texts say."""

from __future__ import annotations

import math

import pytest

from eval.measure import cellularity_rho
from medim.data import pathology


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


def test_what_has_no_picture_or_not_one_band_is_left_out(tiles):
    told, pictures = tiles
    assert cellularity_rho(told, [None, *pictures[1:]])[1] == 23
    assert cellularity_rho([dict.fromkeys(told[0], False), dict.fromkeys(told[0], True), *told[2:]], pictures)[1] == 22
    rho, n = cellularity_rho(told[:1] * 24, pictures)
    assert math.isnan(rho) and n == 24  # one band has no ranks
