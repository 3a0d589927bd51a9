"""Judges whether adversarial training is healthy, from the logged means alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from base.bounds import Count, Weight
from base.config import ConfigError
from base.objective import HISTORY_WINDOWS

LOWEST_ACCURACY = 0.05


@dataclass(frozen=True)
class HealthConfig:
    """Thresholds of a stage's alarms (engine.on_alarm says what an alarm does)."""

    windows: Count = 3
    """Consecutive log windows that must all look wrong."""
    collapse_db: Weight = 3.0
    """Fall of the training PSNR below the best of the last windows, in dB; 0 turns this alarm off."""
    perfect_accuracy: Weight = 0.995
    """The discriminator has won when it is right on more than this share of both originals and
    reconstructions."""
    saturated_share: Weight = 0.5
    """Share of micro-batches in which an adaptive weight stands at its ceiling."""

    def __post_init__(self) -> None:
        if not 1 <= self.windows <= HISTORY_WINDOWS:
            raise ConfigError(f"health.windows is {self.windows}; it must be in 1..{HISTORY_WINDOWS}")


def alarms(history: Sequence[Mapping[str, float]], config: HealthConfig) -> list[str]:
    """One sentence for each thing that looked wrong in all of the last `config.windows` windows.

    `history`: logged means, oldest first; keys that a stage does not log are not judged.
    """
    recent = history[-config.windows :]
    if len(recent) < config.windows:
        return []
    found = []
    known, now = (_finite("psnr", windows) for windows in (history, recent))
    if config.collapse_db > 0 and now and max(known) - max(now) > config.collapse_db:
        found.append(f"the reconstruction fell from {max(known):.1f} to {max(now):.1f} dB")
    real = [window.get("adversary_accuracy_real") for window in recent]
    fake = [window.get("adversary_accuracy_fake") for window in recent]
    pairs = [(r, f) for r, f in zip(real, fake, strict=True) if r is not None and f is not None]
    if len(pairs) == config.windows:
        if all(min(pair) > config.perfect_accuracy for pair in pairs):
            found.append("the discriminator tells originals and reconstructions apart without a mistake")
        if all(min(p) < LOWEST_ACCURACY and max(p) > 1 - LOWEST_ACCURACY for p in pairs):
            found.append("the discriminator gives the same answer for everything")
    for name in ("lambda_gan_saturated", "lambda_pivot_saturated"):
        if all(window.get(name, 0.0) > config.saturated_share for window in recent):
            found.append(f"{name.removesuffix('_saturated')} stands at its ceiling")
    return found


def _finite(name: str, windows: Sequence[Mapping[str, float]]) -> list[float]:
    """The finite values of a metric, in the order of the windows."""
    values = [window[name] for window in windows if name in window]
    return [value for value in values if math.isfinite(value)]
