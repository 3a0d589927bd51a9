"""Optimizer settings; the learning rate as a pure function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from engine.config import ConfigError


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: float
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape of the way from `lr` to `final_lr`."""
    final_lr: float = 0.0
    """Learning rate from step `decay_end_step` on (cosine and linear)."""
    warmup_steps: int = 0
    """Steps of linear warm-up from zero."""
    decay_start_step: int = 0
    """Step at which the decay begins (cosine and linear)."""
    decay_end_step: int | None = None
    """Step at which `final_lr` is reached; None: the run's last step."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only (biases, norms and tokens are left alone)."""
    grad_clip: float = 0.0
    """Largest global gradient norm; 0 is off."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ConfigError(f"lr is {self.lr}; it must be above 0")
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ConfigError(f"beta1 {self.beta1} and beta2 {self.beta2} must lie in [0, 1)")


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


def build_optimizer(config: OptimizerConfig, module: nn.Module) -> torch.optim.AdamW:
    """AdamW over the trainable parameters of `module`: one group with weight decay, one without."""
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.ndim >= 2]
    others = [parameter for parameter in trainable if parameter.ndim < 2]
    groups = [
        {"params": group, "weight_decay": decay}
        for group, decay in ((matrices, config.weight_decay), (others, 0.0))
        if group
    ]
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )
