"""How GPUs multiply in fp32: in TF32 (10 bits of mantissa, several times the speed) or exactly.

Every command starts with TF32 allowed; `engine.tf32` decides for a training; what measures is exact.
NVIDIA_TF32_OVERRIDE=0 in the environment forbids it to all of them. CPUs know no TF32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def allow_tf32(allowed: bool) -> None:
    """Of matrix products (PyTorch's default: exact) and convolutions (its default: TF32), in this process."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def exact_fp32() -> Iterator[None]:
    """Inside no product is TF32's; also a decorator."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    allow_tf32(False)
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
