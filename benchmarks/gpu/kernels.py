"""Shares of a step by class of kernel, from the names that torch.profiler gives."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

CLASSES = (
    ("communication", r"nccl|gloo|all_?reduce|all_?gather|reduce_?scatter"),
    ("attention", r"flash|fmha|attention|sdpa|attn"),
    ("optimizer", r"adam|muon|multi_tensor|_foreach|lpnorm|clip_grad"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|wgmma|cublas|triton_tem|splitkreduce|conv|::(add|b|ba)?mm$|::linear"),
    ("norms and elementwise", r"triton_(poi|red|per)"),
    ("copies", r"memcpy|memset|copy|catarray|::cat$|index|gather|scatter|embedding|fill|zero_|transpose|nchw|nhwc"),
    ("norms and elementwise", r"elementwise|norm|reduce|softmax|silu|welford|vectorized|::(add|mul|sub|sum|mean)"),
)  # fmt: skip
"""Class -> pattern of kernel names (CUDA, CUTLASS, Triton, cuDNN, CPU operators). The first match decides."""
OTHER = "other"


def kernel_class(name: str) -> str:
    """Class of one kernel."""
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name, re.IGNORECASE)), OTHER)


def shares(kernels: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Share of each class in the sum of the seconds. Every class is named, so that pages can be compared."""
    total = dict.fromkeys([*(kind for kind, _ in CLASSES), OTHER], 0.0)
    for name, seconds in kernels:
        total[kernel_class(name)] += seconds
    whole = sum(total.values())
    return {kind: seconds / whole if whole else 0.0 for kind, seconds in total.items()}


def profiled(step: Callable[[], object], device: torch.device) -> tuple[dict[str, float], list[str]]:
    """Shares of one call of `step`, and the names of the slowest kernels that no class matches."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    found = [
        (event.key, float(event.self_device_time_total if on_gpu else event.self_cpu_time_total))
        for event in profiler.key_averages()
    ]
    unknown = sorted(((s, name) for name, s in found if kernel_class(name) == OTHER and s), reverse=True)
    return shares(found), [name[:120] for _, name in unknown[:5]]
