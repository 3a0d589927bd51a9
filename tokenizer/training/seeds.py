"""Independent random streams of one micro-batch, all derived from the batch's seed."""

from __future__ import annotations

import enum

import numpy as np
import torch


class Purpose(enum.IntEnum):
    """What a stream is for. The numbers are part of every run's results: never renumber."""

    FEATURE_NOISE = 0
    LATENT = 1
    AUGMENT_GENERATOR = 2
    AUGMENT_REAL = 3
    AUGMENT_FAKE = 4


def generator(seed: int, purpose: Purpose, device: torch.device) -> torch.Generator:
    """A generator on `device`, a function of (seed, purpose) alone. CPU and CUDA draw different numbers."""
    (mixed,) = np.random.SeedSequence((seed, int(purpose))).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed) >> 1)
