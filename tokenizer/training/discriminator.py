"""The discriminator: frozen representation features, small trainable heads (StyleGAN-T, VAR, RAE lineage).

Shapes: B batch, D feature width, N patch tokens of the frozen model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tokenizer.norms import GroupNorm
from tokenizer.representation import Representation
from tokenizer.training.stage_config import DiscriminatorConfig
from tokenizer.weights import freeze

NUM_GROUPS = 32
LEAK = 0.2
SPECTRAL_EPS = 1e-12
POWER_ITERATIONS_AT_START = 15


class FrozenFeatures(nn.Module):
    """pixels_01 -> one [B, D, N] per depth: patch tokens plus the class token, if the model has one."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.representation = Representation(config.representation)
        self.representation.check_depths(config.depths, "discriminator")
        self.depths = config.depths
        freeze(self)

    def forward(self, pixels_01: Tensor) -> list[Tensor]:
        """[B, 3, H, W] -> len(depths) tensors [B, D, N]; differentiable towards the pixels."""
        levels = self.representation.intermediates(pixels_01, self.depths)
        has_class_token = self.representation.has_class_token
        return [
            (patches + prefix[:, :1] if has_class_token else patches).transpose(1, 2)
            for patches, prefix in levels
        ]


class SpectralConv1d(nn.Module):
    """Circular 1-D convolution whose weight is divided by its largest singular value (Miyato et al. 2018).

    The power iteration runs in `step_power_iteration`, once per global step, not in every forward pass:
    results then do not depend on how many micro-batches a rank has.
    """

    left: Tensor

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        self.register_buffer("left", F.normalize(torch.randn(out_channels), dim=0, eps=SPECTRAL_EPS))
        for _ in range(POWER_ITERATIONS_AT_START):
            self.step_power_iteration()

    @torch.no_grad()
    def step_power_iteration(self) -> None:
        """One update of the left singular vector, from the weight as it is now."""
        image = (self.weight.flatten(1) * self._right()).sum(dim=1)
        self.left.copy_(F.normalize(image, dim=0, eps=SPECTRAL_EPS))

    def forward(self, x_BDN: Tensor) -> Tensor:
        """[B, in, N] -> [B, out, N]."""
        # Products and sums, not matmul: autocast would take the norm in bf16.
        sigma = ((self.weight.flatten(1) * self._right()).sum(dim=1) * self.left).sum()
        half = self.weight.shape[2] // 2
        if half:
            x_BDN = F.pad(x_BDN, (half, half), mode="circular")
        return F.conv1d(x_BDN, self.weight / sigma, self.bias)

    @torch.no_grad()
    def _right(self) -> Tensor:
        return F.normalize((self.weight.flatten(1) * self.left[:, None]).sum(dim=0), dim=0, eps=SPECTRAL_EPS)


class Head(nn.Module):
    """Pointwise block, residual block, pointwise logit; GroupNorm keeps the samples of a batch independent."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        groups = NUM_GROUPS if width % NUM_GROUPS == 0 else 1
        self.first = SpectralConv1d(width, width, 1)
        self.first_norm = GroupNorm(groups, width)
        self.second = SpectralConv1d(width, width, kernel_size)
        self.second_norm = GroupNorm(groups, width)
        self.logit = SpectralConv1d(width, 1, 1)

    def forward(self, x_BDN: Tensor) -> Tensor:
        """[B, D, N] -> logits [B, N] fp32."""
        x_BDN = F.leaky_relu(self.first_norm(self.first(x_BDN)), LEAK)
        residual_BDN = F.leaky_relu(self.second_norm(self.second(x_BDN)), LEAK)
        logits: Tensor = self.logit((x_BDN + residual_BDN) * 0.5**0.5)
        return logits[:, 0].float()


class Heads(nn.Module):
    """One head per depth: the trainable part of the discriminator, with an optimizer of its own."""

    def __init__(self, width: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(width, config.kernel_size) for _ in config.depths)
        self._step = -1
        self.register_load_state_dict_post_hook(_forget_step)  # type: ignore[no-untyped-call]

    def begin_step(self, step: int) -> None:
        """Call before the first use in a global step: updates the spectral norms once."""
        if step == self._step:
            return
        self._step = step
        for module in self.modules():
            if isinstance(module, SpectralConv1d):
                module.step_power_iteration()

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """One [B, D, N] per depth -> logits [B, depths * N]."""
        return torch.cat([head(level) for head, level in zip(self.heads, levels, strict=True)], dim=1)


def _forget_step(heads: nn.Module, _incompatible: object) -> None:
    """A checkpoint's weights precede their step's power iteration, so the heads must run it again."""
    assert isinstance(heads, Heads)
    heads._step = -1


def frozen_logits(heads: Heads, levels: Sequence[Tensor]) -> Tensor:
    """Logits with the heads' weights held constant: gradients reach `levels`, never the heads."""
    constants: Mapping[str, Tensor] = {name: weight.detach() for name, weight in heads.named_parameters()}
    return functional_call(heads, dict(constants), (levels,))  # type: ignore[no-any-return]
