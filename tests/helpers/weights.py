"""Weights that leave no part of a module untested."""

import torch
from torch import nn


def randomise(module: nn.Module) -> None:
    """Random values everywhere, so that no bias, norm or scale is left at 0 or 1 and untested."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.dim() == 1))


def shake(module: nn.Module, seed: int, std: float) -> None:
    """Adds normal noise to every parameter, from `seed` alone, so that no weight stays at its initial 0."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=noise)
