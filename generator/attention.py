"""Joint attention over a packed batch; the mixed mask is never materialised.

Every split of a sample is one segment of queries. Its keys are the visible prefix of its sample and the split
itself. One plan runs in two ways: padded buckets through SDPA (any device), and the variable-length kernels of
generator/flash.py (CUDA, bf16 or fp16).

Shape suffixes: T tokens in storage order, S segments of a bucket, L padded segment length, N query heads,
K key/value heads, H head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from base.config import UserError
from data.packs.attention_plan import AttentionPlan
from generator.config import Backend, Kernel
from generator.flash import PACKAGES, varlen_attention, why_not
from generator.gather import gather_rows

NOT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""SDPA's kernels without cuDNN. cuDNN builds a graph for every shape, and every pack has buckets of other shapes."""
JointAttention = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer index, q [T, N, H], k [T, K, H], v [T, K, H]), rotated and in storage order -> [T, N, H]."""


def planned_attention(plan: AttentionPlan, forced: Backend) -> JointAttention:
    """The joint attention of one pack: runs its plan on the backend that suits each layer's tensors."""

    def attention(_layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        kernel = choose_backend(q_TNH.device, q_TNH.dtype, forced, q_TNH.shape[2])
        return attend(q_TNH, k_TKH, v_TKH, plan.of(len(q_TNH)), kernel)

    return attention


def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan, backend: Kernel) -> Tensor:
    """softmax(q k^T / sqrt(H) + mask) v, [T, N, H] in the order of the queries, in the dtype of `v_TKH`.

    Keys may outnumber queries (the sampler's prefix cache); the plan's indices say which rows belong
    together.
    """
    if not len(q_TNH):
        # An empty result that depends on all three tensors: ZeRO waits for a gradient of every parameter.
        return q_TNH * (k_TKH.sum() + v_TKH.sum())
    if backend == "sdpa":
        return _attend_buckets(q_TNH, k_TKH, v_TKH, plan)
    outputs = [
        varlen_attention(
            backend, queries, gather_rows(k_TKH, group), gather_rows(v_TKH, group), group, causal=causal
        )
        for queries, group, causal in (
            (q_TNH[: plan.num_causal], plan.causal, True),
            (q_TNH[plan.num_causal :], plan.full, False),
        )
        if len(queries)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def choose_backend(
    device: torch.device, dtype: torch.dtype, forced: Backend = "auto", head_dim: int | None = None
) -> Kernel:
    """The kernel for tensors like these: the first flash-attn that is installed and runs here, else PyTorch's varlen,
    else SDPA. `head_dim` None: its limits are not checked. Under torch.use_deterministic_algorithms only kernels whose
    backward pass is deterministic run. Raises UserError: a forced kernel cannot run.
    """
    if forced == "sdpa":
        return "sdpa"
    reasons: dict[str, None] = {}
    for name in PACKAGES:
        if forced in ("auto", name) or (forced == "flash" and name.startswith("flash")):
            reason = why_not(name, device, dtype, head_dim)
            if reason is None:
                return name
            reasons[reason] = None
    if forced == "auto":
        return "sdpa"
    raise UserError(
        f"attention_backend '{forced}' cannot run on {device.type} in {dtype}: {'; '.join(reasons)}; "
        "use 'auto'"
    )


def _attend_buckets(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, plan: AttentionPlan) -> Tensor:
    share = q_TNH.shape[1] // k_TKH.shape[1]
    if q_TNH.is_cuda and share > 1:  # cuDNN alone takes a mask and grouped heads
        k_TKH, v_TKH, share = k_TKH.repeat_interleave(share, 1), v_TKH.repeat_interleave(share, 1), 1
    outputs = []
    with sdpa_kernel(NOT_CUDNN):
        for bucket in plan.buckets:
            out_SNLH = F.scaled_dot_product_attention(
                _gather(q_TNH, bucket.q_index),
                _gather(k_TKH, bucket.kv_index),
                _gather(v_TKH, bucket.kv_index),
                attn_mask=bucket.mask,
                enable_gqa=share > 1,
            )
            outputs.append(out_SNLH.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).index_select(0, plan.out_index)


def _gather(x_TNH: Tensor, index_SL: Tensor) -> Tensor:
    """Rows of `x_TNH` as [S, N, L, H]."""
    return x_TNH.index_select(0, index_SL.flatten()).view(*index_SL.shape, *x_TNH.shape[1:]).transpose(1, 2)
