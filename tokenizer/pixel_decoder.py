"""The pixel decoder D: a ViT from the feature map to pixels, in RAE's layout.

Shapes: B batch, D feature width, W decoder width, Y X token grid, N = Y * X, P patch side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from base.config import ConfigError
from tokenizer.config import PixelDecoderConfig
from tokenizer.norms import LayerNorm
from tokenizer.transformer import Layer, init_linears, run_layers

NORM_EPS = 1e-12
POSITION_MAX_PERIOD = 10_000.0
SMALL_STD = 0.02


class PixelDecoder(nn.Module):
    """f or f_hat -> pixels_01: Linear, class token, positions, transformer, LayerNorm, Linear, unpatchify.

    `mean` and `std` are the representation model's pixel statistics: the last Linear predicts normalised
    pixels.
    """

    positions: Tensor
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
        if config.width % 4 or config.width % config.heads:
            raise ConfigError(
                f"decoder width {config.width} must be a multiple of 4 and of heads {config.heads}"
            )
        self.config = config
        self.grid = grid
        self.activation_checkpointing = False
        self.embed = nn.Linear(feature_width, config.width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.layers = nn.ModuleList(
            Layer(config.width, config.heads, config.mlp_width, NORM_EPS) for _ in range(config.layers)
        )
        self.norm = LayerNorm(config.width, eps=NORM_EPS)
        self.to_pixels = nn.Linear(config.width, config.patch_px * config.patch_px * 3)
        self.register_buffer("positions", sincos_positions(config.width, grid), persistent=False)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(3, 1, 1), persistent=False)
        init_linears(self)
        nn.init.normal_(self.class_token, std=SMALL_STD)
        nn.init.normal_(self.to_pixels.weight, std=SMALL_STD)  # the first images are close to the mean colour

    @property
    def last_weight(self) -> nn.Parameter:
        """W' of the adaptive GAN weight: the last Linear's weight [P * P * 3, W]."""
        weight = self.to_pixels.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, f_BDYX: Tensor) -> Tensor:
        """[B, D, Y, X] -> pixels_01 [B, 3, Y * P, X * P] fp32, not clamped."""
        x_BNW = self.embed(f_BDYX.flatten(2).transpose(1, 2))
        x_BNW = torch.cat([self.class_token.expand(len(x_BNW), -1, -1).to(x_BNW.dtype), x_BNW], dim=1)
        x_BNW = x_BNW + self.positions
        x_BNW = run_layers(self.layers, x_BNW, self.activation_checkpointing)
        patches = self.to_pixels(self.norm(x_BNW[:, 1:])).float()
        return self._unpatchify(patches) * self.pixel_std + self.pixel_mean

    def _unpatchify(self, patches: Tensor) -> Tensor:
        """[B, N, P * P * 3], each patch stored (row, column, channel) -> [B, 3, Y * P, X * P]."""
        Y, X = self.grid
        P = self.config.patch_px
        pixels = patches.view(-1, Y, X, P, P, 3).permute(0, 5, 1, 3, 2, 4)
        return pixels.reshape(-1, 3, Y * P, X * P)


def sincos_positions(width: int, grid: tuple[int, int]) -> Tensor:
    """Fixed 2-D sin-cos table [1, 1 + Y * X, width] fp32; row 0 (class token) is zero (MAE, He et al. 2022).

    The first half of the width encodes x, the second y; each half holds sines, then cosines, of the
    coordinate over `width / 4` frequencies between 1 and 1 / 10,000.
    """
    Y, X = grid
    exponent = torch.arange(width // 4, dtype=torch.float64) / (width // 4)
    frequency = POSITION_MAX_PERIOD**-exponent
    y, x = torch.meshgrid(
        torch.arange(Y, dtype=torch.float64), torch.arange(X, dtype=torch.float64), indexing="ij"
    )
    angle_x, angle_y = x.reshape(-1, 1) * frequency, y.reshape(-1, 1) * frequency
    table = torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1)
    return torch.cat([torch.zeros_like(table[:1]), table])[None].float()
