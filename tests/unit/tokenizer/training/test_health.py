"""Alarms of the adversarial training, from logged means."""

import pytest
import torch

from tokenizer.training import adaptive
from tokenizer.training.health import HealthConfig, alarms

CONFIG = HealthConfig(windows=2)
GOOD = {
    "psnr": 22.0,
    "adversary_accuracy_real": 0.8,
    "adversary_accuracy_fake": 0.7,
    "lambda_gan_saturated": 0.0,
    "lambda_pivot_saturated": 0.1,
}


def test_a_healthy_run_raises_no_alarm():
    assert alarms([GOOD] * 5, CONFIG) == []


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"psnr": 18.5}, "fell from 22.0 to 18.5 dB"),
        ({"adversary_accuracy_real": 1.0, "adversary_accuracy_fake": 0.999}, "without a mistake"),
        ({"adversary_accuracy_real": 0.0, "adversary_accuracy_fake": 1.0}, "same answer for everything"),
        ({"lambda_gan_saturated": 0.9}, "lambda_gan stands at its ceiling"),
        ({"lambda_pivot_saturated": 0.9}, "lambda_pivot stands at its ceiling"),
    ],
)
def test_an_alarm_needs_windows_in_a_row(bad, sentence):
    window = {**GOOD, **bad}
    assert alarms([GOOD, GOOD, window], CONFIG) == []
    assert alarms([GOOD, window, GOOD], CONFIG) == []
    (found,) = alarms([GOOD, window, window], CONFIG)
    assert sentence in found


def test_a_stage_without_adversary_or_pixels_is_not_judged_by_them():
    assert alarms([{"feature": 0.1, "kl": 2.0}] * 3, CONFIG) == []
    assert alarms([{**GOOD, "psnr": 12.0}] * 2, HealthConfig(windows=2, collapse_db=0.0)) == []


def test_a_weight_at_its_ceiling_is_reported():
    for value, saturated in ((3.0, 0.0), (10.0, 1.0)):
        metrics = adaptive.weight_metrics("lambda_gan", torch.tensor(value), ceiling=10.0)
        assert float(metrics["lambda_gan_saturated"]) == saturated
