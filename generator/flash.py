"""Variable-length attention kernels: flash-attn 4, 3 and 2 and PyTorch's own, behind one call.

Each kernel comes from a package of its own, which is looked for without an import and imported only when its kernel
may be chosen. All kernels take packed tokens, cumulative lengths and grouped heads, and align a causal mask at the
bottom right. Forward passes are deterministic; backward passes are if torch.use_deterministic_algorithms is on.

Shape suffixes: T tokens, N query heads, K key/value heads, H head dim.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from data.packs.attention_plan import VarlenGroup
from generator.config import VarlenName

HALF = (torch.float16, torch.bfloat16)
HEAD_DIM_STEP = 8
"""Step of the head dim: every kernel reads 16 bytes of a head at once."""


@dataclass(frozen=True)
class VarlenPackage:
    """Where a kernel comes from and what it runs on."""

    module: str
    """The module that holds the function. flash-attn 2 and 4 share the folder flash_attn; either may be missing."""
    function: str
    """The function's name in the module."""
    install: str
    """The package that a person installs."""
    head_dims: Mapping[int, int]
    """Major compute capability -> largest head dim, forward and backward."""
    deterministic_head_dim: int = 256
    """Largest head dim of a deterministic backward pass."""


FROM_AMPERE = dict.fromkeys((8, 9, 10, 11, 12), 256)
_FLASH = "flash_attn_varlen_func"
PACKAGES: Mapping[VarlenName, VarlenPackage] = {
    # flash-attn 3 is written for capability 9 alone, where flash-attn 4 is not measured yet.
    "flash3": VarlenPackage(
        "flash_attn_interface", _FLASH, "flash-attn-3", {9: 256}, deterministic_head_dim=192
    ),
    # flash-attn 4: no backward on capability 8, few shapes on 12, a separate kernel for head dim 256 on 10 and 11.
    "flash4": VarlenPackage("flash_attn.cute", _FLASH, "flash-attn-4", {9: 256, 10: 128, 11: 128}),
    "flash2": VarlenPackage("flash_attn.flash_attn_interface", _FLASH, "flash-attn", FROM_AMPERE),
    "varlen": VarlenPackage("torch.nn.attention.varlen", "varlen_attn", "torch 2.11 or newer", FROM_AMPERE),
}
"""The packages in order of preference."""


def why_not(name: VarlenName, device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str | None:
    """Why this kernel cannot run on such tensors, in a few words; None if it can. `head_dim` None: not checked.

    Imports the package only if nothing else rules the kernel out.
    """
    package = PACKAGES[name]
    if device.type != "cuda" or dtype not in HALF:
        return "it needs CUDA and bf16 or fp16"
    if not _installed(package.module):
        return f"{package.install} is not installed"
    major, minor = torch.cuda.get_device_capability(device)
    if major not in package.head_dims:
        return f"it does not run on compute capability {major}.{minor}"
    if head_dim is not None and (head_dim % HEAD_DIM_STEP or head_dim > package.head_dims[major]):
        return f"head_dim {head_dim} is not a multiple of {HEAD_DIM_STEP} up to {package.head_dims[major]}"
    if (problem := _import_problem(name)) or not torch.are_deterministic_algorithms_enabled():
        return problem
    if head_dim is not None and head_dim > package.deterministic_head_dim:
        return f"its backward pass is not deterministic for head_dim {head_dim}"
    # PyTorch's own kernel reads torch.use_deterministic_algorithms itself.
    if name != "varlen" and "deterministic" not in _parameters(_function(name)):
        return f"this {package.install} has no deterministic backward pass"
    return None


def varlen_attention(
    name: VarlenName, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, group: VarlenGroup, *, causal: bool
) -> Tensor:
    """One variable-length call, [T, N, H]. `k_TKH`, `v_TKH`: gathered, segment after segment.

    A causal mask is aligned at the bottom right: the last query sees the last key.
    """
    function = _function(name)
    if name == "varlen":
        return _torch_call(function, q_TNH, k_TKH, v_TKH, group, causal=causal)
    options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
    result = function(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens_q=group.cu_q,
        cu_seqlens_k=group.cu_k,
        max_seqlen_q=group.max_q,
        max_seqlen_k=group.max_k,
        causal=causal,
        **options,
    )
    # flash-attn 4 and the first versions of 3 also give the log-sum-exp.
    out: Tensor = result[0] if isinstance(result, tuple) else result
    return out


def _torch_call(
    function: Callable[..., Tensor],
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    group: VarlenGroup,
    *,
    causal: bool,
) -> Tensor:
    """Calls PyTorch's kernel. `enable_gqa` exists from torch 2.12 on; before, every query head needs its own k and v.

    From 2.15 on PyTorch would choose a new enough cuDNN, which builds a graph for the lengths of every new pack.
    """
    options: dict[str, Any] = {"window_size": (-1, 0) if causal else (-1, -1)}
    if "enable_gqa" in _parameters(function):
        options["enable_gqa"] = q_TNH.shape[1] != k_TKH.shape[1]
    else:
        share = q_TNH.shape[1] // k_TKH.shape[1]
        k_TKH, v_TKH = k_TKH.repeat_interleave(share, 1), v_TKH.repeat_interleave(share, 1)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return function(q_TNH, k_TKH, v_TKH, group.cu_q, group.cu_k, group.max_q, group.max_k, **options)


def _function(name: VarlenName) -> Callable[..., Any]:
    package = PACKAGES[name]
    function: Callable[..., Any] = getattr(importlib.import_module(package.module), package.function)
    return function


@lru_cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


@lru_cache
def _installed(module: str) -> bool:
    """Whether the import system finds this module, without importing it or its parents."""
    parts = module.split(".")
    spec = importlib.util.find_spec(parts[0])
    for depth in range(2, len(parts) + 1):
        if spec is None:
            return False
        # importlib.util.find_spec would import the parent.
        spec = PathFinder.find_spec(".".join(parts[:depth]), spec.submodule_search_locations)
    return spec is not None


@lru_cache
def _import_problem(name: VarlenName) -> str | None:
    """Why importing the package fails, most often as a build for another PyTorch; None if it works."""
    package = PACKAGES[name]
    try:
        function = _function(name)
    except (ImportError, OSError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        return f"{package.install} is installed but cannot be imported ({reason})"
    if name == "varlen" and "window_size" not in _parameters(function):
        return "torch 2.10 cannot say which keys are seen; it needs torch 2.11"
    return None
