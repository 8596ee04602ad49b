"""PSNR against its definition, SSIM at its ends."""

from __future__ import annotations

import math

import numpy as np
import PIL.Image
import pytest

from medim.metrics import image


def picture(values: np.ndarray) -> PIL.Image.Image:
    return PIL.Image.fromarray(values.astype(np.uint8))


NOISE = np.random.default_rng(0).integers(0, 246, (16, 16))


def test_psnr_of_a_constant_error():
    # mean squared error 100
    assert image.psnr(picture(NOISE), picture(NOISE + 10)) == pytest.approx(10 * math.log10(255**2 / 100))


def test_equal_pictures():
    assert image.psnr(picture(NOISE), picture(NOISE)) == math.inf
    assert image.ssim(picture(NOISE), picture(NOISE)) == pytest.approx(1.0)


def test_ssim_falls_with_noise_and_is_negative_for_a_negative():
    noisy = picture(np.clip(NOISE + np.random.default_rng(1).normal(0, 30, NOISE.shape), 0, 255))
    assert 0.3 < image.ssim(picture(NOISE), noisy) < 0.98
    assert image.ssim(picture(NOISE), picture(255 - NOISE)) < 0


def test_gray_and_colour_meet_as_colour():
    colour = picture(np.stack([NOISE + 10] * 3, axis=-1))
    assert image.psnr(picture(NOISE), colour) == pytest.approx(10 * math.log10(255**2 / 100))
    assert image.ssim(colour, colour) == pytest.approx(1.0)


@pytest.mark.parametrize("metric", [image.psnr, image.ssim])
def test_sizes_must_match(metric):
    with pytest.raises(ValueError, match="cannot be compared"):
        metric(picture(NOISE), picture(NOISE[:8]))
