"""Equal bits from equal inputs on a GPU."""

from __future__ import annotations

import os

import torch

from base.config import UserError

CUBLAS_WORKSPACES = (":4096:8", ":16:8")
"""Those under which cuBLAS repeats itself (its documentation, "Results reproducibility")."""


def make_deterministic() -> None:
    """From now on this process takes only operations that repeat themselves bit for bit; one that has no such form
    raises a RuntimeError with its name. To be called before CUDA and NCCL are used.

    Raises UserError: the environment forbids it to cuBLAS.
    """
    workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
    if workspace not in CUBLAS_WORKSPACES:
        raise UserError(
            f"engine.deterministic: under CUBLAS_WORKSPACE_CONFIG={workspace}, as the environment has it, cuBLAS does "
            f"not repeat itself; unset it or make it {' or '.join(CUBLAS_WORKSPACES)}"
        )
    os.environ.setdefault("NCCL_ALGO", "Ring")  # else it may sum inside the switches, in the order of arrival
    torch.use_deterministic_algorithms(True)  # not warn_only: attention kernels would take no notice
    # A search aid; it writes every new tensor once more.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = False
