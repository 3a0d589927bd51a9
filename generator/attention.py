"""Joint attention over a packed batch; the mixed mask is never materialised (contract 4).

Every split of a sample is one segment of queries whose keys are the visible prefix of its sample and the
split itself. Three ways to run the same plan: padded buckets through SDPA (any device), and variable-length
kernels of PyTorch or of flash-attn (CUDA, bf16 or fp16).

Shape suffixes: T tokens in storage order, S segments of a bucket, L padded segment length, N query heads,
K key/value heads, H head dim.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from data.attention_plan import AttentionPlan, VarlenGroup
from engine.config import UserError

Kernel = Literal["sdpa", "varlen", "flash"]
Backend = Literal["auto"] | Kernel
JointAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q [T, N, H], k [T, K, H], v [T, K, H]), rotated and in storage order -> [T, N, H]."""
HALF = (torch.float16, torch.bfloat16)


def planned_attention(plan: AttentionPlan, forced: Backend) -> JointAttention:
    """The joint attention of one pack: its plan, on the backend that suits the tensors each layer brings."""

    def attention(_layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        return attend(
            q_TNH, k_TKH, v_TKH, plan.of(len(q_TNH)), choose_backend(q_TNH.device, q_TNH.dtype, forced)
        )

    return attention


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan, backend: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v, [T, N, H] in the order of the queries, in the dtype of `v_TKH`.

    Keys may outnumber queries (the sampler's prefix cache); the plan's indices say which rows belong
    together.
    """
    if backend == "sdpa":
        return _attend_buckets(q_TNH, k_TKH, v_TKH, plan)
    groups = ((plan.causal, True), (plan.full, False))
    queries = (q_TNH[: plan.num_causal], q_TNH[plan.num_causal :])
    outputs = [
        _attend_group(q, k_TKH, v_TKH, group, causal, backend) if q.shape[0] else q
        for q, (group, causal) in zip(queries, groups, strict=True)
    ]
    return torch.cat(outputs)


def choose_backend(device: torch.device, dtype: torch.dtype, forced: Backend = "auto") -> Kernel:
    """The backend for tensors like these: on CUDA in half precision flash-attn if installed, else PyTorch's
    varlen, else SDPA. Raises UserError when a forced backend cannot run here.
    """
    kernels = device.type == "cuda" and dtype in HALF
    usable = {"flash": kernels and _has_flash(), "varlen": kernels and _has_varlen(), "sdpa": True}
    if forced == "auto":
        return "flash" if usable["flash"] else "varlen" if usable["varlen"] else "sdpa"
    if not usable[forced]:
        raise UserError(
            f"attention_backend '{forced}' cannot run on {device.type} in {dtype} here; it "
            "needs CUDA, bf16 or fp16 and the package; use 'auto'"
        )
    return forced


@lru_cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


@lru_cache
def _has_varlen() -> bool:
    """It came with torch 2.10; grouped heads, and window_size as its way to say causal, came later."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def _attend_buckets(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan) -> Tensor:
    outputs = []
    for bucket in plan.buckets:
        out_SNLH = F.scaled_dot_product_attention(
            _gather(q_TNH, bucket.q_index),
            _gather(k_TKH, bucket.kv_index),
            _gather(v_TKH, bucket.kv_index),
            attn_mask=bucket.mask,
            enable_gqa=q_TNH.shape[1] != k_TKH.shape[1],
        )
        outputs.append(out_SNLH.transpose(1, 2).flatten(0, 1))
    if not outputs:
        return q_TNH
    return torch.cat(outputs).index_select(0, plan.out_index)


def _gather(x_TNH: Tensor, index_SL: Tensor) -> Tensor:
    """Rows of `x_TNH` as [S, N, L, H]."""
    return x_TNH.index_select(0, index_SL.flatten()).view(*index_SL.shape, *x_TNH.shape[1:]).transpose(1, 2)


def _attend_group(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    group: VarlenGroup,
    causal: bool,
    backend: Kernel,
) -> Tensor:
    """One variable-length call; causal is aligned bottom right: the last query sees the last key."""
    k_TKH, v_TKH = k_TKH.index_select(0, group.kv_index), v_TKH.index_select(0, group.kv_index)
    if backend == "varlen":
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(
            q_TNH,
            k_TKH,
            v_TKH,
            group.cu_q,
            group.cu_k,
            group.max_q,
            group.max_k,
            window_size=(-1, 0) if causal else (-1, -1),
            enable_gqa=q_TNH.shape[1] != k_TKH.shape[1],
        )
        assert isinstance(out, Tensor)
        return out
    from flash_attn import flash_attn_varlen_func

    result: Tensor = flash_attn_varlen_func(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens_q=group.cu_q,
        cu_seqlens_k=group.cu_k,
        max_seqlen_q=group.max_q,
        max_seqlen_k=group.max_k,
        causal=causal,
    )
    return result
