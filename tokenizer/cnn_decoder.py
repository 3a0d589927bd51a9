"""The pixel decoder D as a convolutional network: Stable Diffusion's decoder on the feature map (paper, Table 5b).

Shapes: B batch, D feature width, Y X token grid, P side in pixels of the square that a token becomes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base.config import ConfigError
from tokenizer.config import PixelDecoderConfig
from tokenizer.norms import replace_norms

NORM_GROUPS = 32


class CnnDecoder(nn.Module):
    """f or f_hat -> pixels_01: LDM's decoder (Rombach et al. 2022), diffusers' implementation.

    Attention stands in the middle and in every block at the token grid (LDM's attention at 16x16). `mean` and `std`
    are the representation model's pixel statistics: the last convolution predicts normalised pixels, as the ViT
    decoder's last Linear does.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        config: PixelDecoderConfig,
        feature_width: int,
        grid: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        from diffusers.models.autoencoders.vae import Decoder  # takes seconds to import

        levels = len(config.channel_multipliers)
        if 2 ** (levels - 1) != config.patch_px:
            raise ConfigError(
                f"decoder: {levels} channel_multipliers turn a token into {2 ** (levels - 1)} px, "
                f"but patch_px is {config.patch_px}; change one of them"
            )
        if config.base_channels % NORM_GROUPS:
            raise ConfigError(
                f"decoder: base_channels {config.base_channels} is no multiple of {NORM_GROUPS}"
            )
        self.config = config
        self.grid = grid
        self.activation_checkpointing = False
        self.net: Any = Decoder(
            in_channels=feature_width,
            out_channels=3,
            up_block_types=("AttnUpDecoderBlock2D", *["UpDecoderBlock2D"] * (levels - 1)),
            block_out_channels=tuple(config.base_channels * factor for factor in config.channel_multipliers),
            layers_per_block=config.blocks_per_level - 1,  # diffusers adds one to the decoder's
            norm_num_groups=NORM_GROUPS,
        )
        replace_norms(self.net)
        # diffusers' models set this function in enable_gradient_checkpointing; a bare Decoder has no such method.
        self.net._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)

    @property
    def last_weight(self) -> nn.Parameter:
        """W' of the adaptive GAN weight: the last convolution's weight [3, base_channels, 3, 3]."""
        weight = self.net.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, f_BDYX: Tensor) -> Tensor:
        """[B, D, Y, X] -> pixels_01 [B, 3, Y * P, X * P] fp32, not clamped."""
        self.net.gradient_checkpointing = self.activation_checkpointing
        pixels: Tensor = self.net(channels_last_on_gpu(f_BDYX)).float()
        return (pixels * self.pixel_std + self.pixel_mean).contiguous()


def channels_last_on_gpu(x_BCYX: Tensor) -> Tensor:
    """`x_BCYX` in channels-last order on a GPU, whose convolutions are fastest in it; unchanged on a CPU.

    Convolutions keep the order of their input. Weights are not reordered, because ZeRO flattens them anyway.
    """
    return x_BCYX.contiguous(memory_format=torch.channels_last) if x_BCYX.is_cuda else x_BCYX
