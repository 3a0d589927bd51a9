"""Sets how GPUs multiply fp32 numbers: in TF32 (10 bits of mantissa, several times the speed) or exactly.

Every command starts with TF32 allowed. `engine.tf32` decides for a training; measurements are exact.
NVIDIA_TF32_OVERRIDE=0 in the environment forbids TF32 to all commands. CPUs have no TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Allows or forbids TF32 in matrix products (PyTorch's default: exact) and convolutions (its default: TF32)."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Inside, no product uses TF32. Also a decorator."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
