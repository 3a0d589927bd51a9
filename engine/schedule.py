"""Optimizer settings, and the learning rate as a function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from engine.engine_config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of the optimizer step number `step` (from 0) in a run of `num_steps`."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    start = max(config.decay_start_step, config.warmup_steps)
    end = num_steps if config.decay_end_step is None else config.decay_end_step
    progress = min(max((step - start) / max(end - start, 1), 0.0), 1.0)
    if config.schedule == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return config.lr + (config.final_lr - config.lr) * progress


def set_learning_rate(
    groups: Sequence[dict[str, Any]], config: OptimizerConfig, step: int, num_steps: int
) -> None:
    """Writes the rate of step number `step` into an optimizer's groups; Muon's rate has the schedule's shape, too."""
    rate = learning_rate(config, step, num_steps)
    for group in groups:
        group["lr"] = rate * config.muon_lr / config.lr if group.get("use_muon") else rate


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters of `module`.

    Its groups: hidden matrices (Muon only), other matrices with weight decay, vectors without.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    hidden = hidden_matrices(module) if config.name == "muon" else set()
    for parameter in trainable:
        parameter.use_muon = parameter in hidden  # type: ignore[attr-defined]  # DeepSpeed's ZeRO reads it
    rest = [parameter for parameter in trainable if parameter not in hidden]
    groups: list[dict[str, Any]] = [
        {
            "params": group,
            "weight_decay": decay,
            "lr": config.lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
        }
        for group, decay in (
            ([parameter for parameter in rest if parameter.ndim >= 2], config.weight_decay),
            ([parameter for parameter in rest if parameter.ndim < 2], 0.0),
        )
        if group
    ]
    if not hidden:
        return torch.optim.AdamW(groups, fused=True)
    return _muon([parameter for parameter in trainable if parameter in hidden], groups, config)


def hidden_matrices(module: nn.Module) -> set[Tensor]:
    """Trainable weights of the nn.Linear inside layer lists (nn.ModuleList, nn.Sequential)."""
    return {
        linear.weight
        for layers in module.modules()
        if isinstance(layers, nn.ModuleList | nn.Sequential)
        for linear in layers.modules()
        if isinstance(linear, nn.Linear) and linear.weight.requires_grad
    }


def _muon(
    hidden: list[nn.Parameter], rest: list[dict[str, Any]], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """DeepSpeed's Muon, which its ZeRO stages can shard."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    muon = {
        "params": hidden,
        "use_muon": True,
        "lr": config.muon_lr,
        "momentum": config.muon_momentum,
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(
        [muon, *({**group, "use_muon": False} for group in rest)],
        adam_optimizer=torch.optim.AdamW,
        adam_optimizer_kwargs={"fused": True},
    )
    return optimizer
