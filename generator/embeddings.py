"""What the generation expert reads: latent tokens, with time and position embedded.

Nothing here is a buffer: sinusoids are computed from their few numbers in fp32 at every call, so no cast of
the module to bf16 can touch them.

Shape suffixes: T generation tokens, I images, C latent channels, D width, F time frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generator.config import MAX_PERIOD

TIME_FREQUENCIES = 256


def time_sinusoids(t_I: Tensor, num_frequencies: int = TIME_FREQUENCIES) -> Tensor:
    """[cos(t w_k), sin(t w_k)] with w_k = 10000^(-k / (F / 2)), k < F / 2, of t itself (not 1000 t). fp32 [I,
    F].
    """
    half = num_frequencies // 2
    frequencies = MAX_PERIOD ** (-torch.arange(half, device=t_I.device, dtype=torch.float32) / half)
    angles = t_I.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def grid_sinusoids(grid_T: Tensor, max_side: int, width: int, max_period: float = MAX_PERIOD) -> Tensor:
    """Rows of the fixed 2-D sin-cos table (MAE layout). fp32 [T, width].

    `grid_T`: int64, y * max_side + x. The first half of the width encodes x, the second y; each half is
    [sin(p w_k), cos(p w_k)] with w_k = max_period^(-k / (width / 4)), k < width / 4.
    """
    quarter = width // 4
    frequencies = max_period ** (-torch.arange(quarter, device=grid_T.device, dtype=torch.float32) / quarter)
    angles = torch.arange(max_side, device=grid_T.device, dtype=torch.float32)[:, None] * frequencies
    side = torch.cat(
        [angles.sin(), angles.cos()], dim=1
    )  # [max_side, width / 2]: both axes look up this one table
    return torch.cat([side[grid_T % max_side], side[grid_T // max_side]], dim=1)


class TimeEmbedding(nn.Module):
    """256 sinusoids of t, Linear, SiLU, Linear: [I] -> [I, D] in the dtype of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(TIME_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_I: Tensor) -> Tensor:
        """`t_I`: fp32 in [0, 1]; 0 for clean images."""
        embedded: Tensor = self.mlp(time_sinusoids(t_I).to(next(self.mlp.parameters()).dtype))
        return embedded


class LatentEmbedding(nn.Module):
    """The generation expert's input: Linear(C -> D)(x_t) + time embedding + position row (Bagel)."""

    def __init__(self, channels: int, width: int, max_side: int, max_period: float) -> None:
        super().__init__()
        self.width, self.max_side, self.max_period = width, max_side, max_period
        self.latent_in = nn.Linear(channels, width)
        self.time_embedding = TimeEmbedding(width)

    def forward(self, x_TC: Tensor, t_I: Tensor, image_index_T: Tensor, grid_T: Tensor) -> Tensor:
        """[T, D]. `t_I`: one time per image, given to its tokens by `image_index_T`; `grid_T`: y * max_side +
        x.
        """
        time_ID = self.time_embedding(t_I)
        place_TD = grid_sinusoids(grid_T, self.max_side, self.width, self.max_period).to(time_ID.dtype)
        tokens: Tensor = self.latent_in(x_TC.to(self.latent_in.weight.dtype))
        tokens = tokens + time_ID.index_select(0, image_index_T) + place_TD
        return tokens
