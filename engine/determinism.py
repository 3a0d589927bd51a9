"""Deterministic mode: equal bits from equal inputs on a GPU."""

from __future__ import annotations

import os

import torch

from base.config import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Values of CUBLAS_WORKSPACE_CONFIG that make cuBLAS deterministic (its documentation, "Results reproducibility")."""


def make_deterministic() -> None:
    """From now on this process runs deterministic operations only. Call it before CUDA and NCCL are used.

    An operation without a deterministic form then raises a RuntimeError with its name. Raises UserError: the
    environment forbids deterministic cuBLAS.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise UserError(
            f"engine.deterministic: under CUBLAS_WORKSPACE_CONFIG={workspace}, as the environment has it, cuBLAS does "
            f"not repeat itself; unset it or make it {' or '.join(CUBLAS_WORKSPACES)}"
        )
    os.environ.setdefault("NCCL_ALGO", "Ring")  # else switches may sum in the order of arrival
    torch.use_deterministic_algorithms(True)  # not warn_only, which attention kernels ignore
    # This aid for debugging would write every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
