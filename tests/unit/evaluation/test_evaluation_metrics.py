"""PSNR on 8-bit images and confidence intervals, against closed forms."""

import math

import pytest
import torch

from evaluation.metrics.interval import mean, rate
from evaluation.metrics.reconstruction import MAX_DB, psnr_db, to_uint8


def test_psnr_of_a_constant_offset_is_the_closed_form() -> None:
    image = torch.full((2, 3, 4, 5), 100, dtype=torch.uint8)
    other = torch.stack([image[0] + 1, image[1] + 10])
    expected = [20 * math.log10(255), 20 * math.log10(25.5)]
    assert psnr_db(other, image).tolist() == pytest.approx(expected, abs=1e-9)  # float64 arithmetic


def test_psnr_is_the_mean_of_db_not_the_db_of_the_mean() -> None:
    image = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = torch.stack([image[0] + 1, image[1] + 100])
    of_mean = 10 * math.log10(255**2 / ((1 + 100**2) / 2))
    assert psnr_db(other, image).mean().item() > of_mean + 10


def test_psnr_does_not_wrap_around_in_8_bits() -> None:
    black, white = (torch.full((1, 3, 2, 2), level, dtype=torch.uint8) for level in (0, 255))
    assert psnr_db(black, white).item() == psnr_db(white, black).item() == 0.0


def test_psnr_of_equal_images_is_finite() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert psnr_db(image, image).item() == MAX_DB


def test_masked_psnr_ignores_everything_outside_the_mask() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    other = image + 10
    other[:, :, :2] = 255
    keep = torch.zeros(1, 4, 4, dtype=torch.bool)
    keep[:, 2:] = True
    assert psnr_db(other, image, keep).item() == pytest.approx(20 * math.log10(25.5), abs=1e-9)
    assert math.isnan(psnr_db(other, image, ~keep & keep).item())


def test_floats_are_truncated_to_8_bits() -> None:
    assert to_uint8(torch.tensor([-1.0, 0.9999 / 255, 1.0001 / 255, 254.99 / 255, 2.0])).tolist() == [
        0,
        0,
        1,
        254,
        255,
    ]


def test_wilson_interval_matches_published_values() -> None:
    # 8 of 10: Wilson score interval without continuity correction (Brown, Cai, DasGupta 2001, eq. 4).
    estimate = rate([True] * 8 + [False] * 2)
    assert (estimate.mean, estimate.n) == (0.8, 10)
    assert (estimate.low, estimate.high) == pytest.approx((0.4902, 0.9433), abs=5e-5)  # four printed digits


@pytest.mark.parametrize("value", [True, False])
def test_wilson_interval_stays_in_range_at_the_ends(value: bool) -> None:
    estimate = rate([value] * 20)
    assert 0 <= estimate.low < estimate.high <= 1
    assert estimate.high - estimate.low > 0.1


def test_mean_interval_is_the_normal_one() -> None:
    estimate = mean([1.0, 2.0, 3.0, 4.0])
    half = 1.959964 * math.sqrt(5 / 3) / 2
    assert (estimate.low, estimate.high) == pytest.approx((2.5 - half, 2.5 + half), abs=1e-5)


def test_nothing_measured_is_nan_not_zero() -> None:
    assert math.isnan(rate([]).mean) and math.isnan(mean([]).mean)
    assert math.isnan(mean([1.0]).low)
