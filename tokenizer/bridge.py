"""The Variational Bridge: feature map f -> compact Gaussian latent z -> feature map (paper 3.1).

Shapes: B batch, D feature width, C latent channels, Y X token grid, N = Y * X.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tokenizer.config import BridgeConfig
from tokenizer.norms import LayerNorm
from tokenizer.transformer import Layer, Mlp, SelfAttention, init_linears, run_layers

NORM_EPS = 1e-5
# exp(-30/2) and exp(20/2): far outside what a trained bridge uses; keeps exp finite early on (LDM's bounds).
LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class BridgeEncoder(nn.Module):
    """VB_e: x1 = LN(x); x = Linear(x) + MHA(x1); x = x + MLP(LN(x)); Linear to (mu, logvar)."""

    def __init__(self, config: BridgeConfig, width: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(width, eps=NORM_EPS)
        self.attention = SelfAttention(width, config.num_heads)
        self.skip = nn.Linear(width, width)
        self.mlp_norm = LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width, round(width * config.encoder_mlp_ratio))
        self.to_moments = nn.Linear(width, 2 * config.latent_channels)
        init_linears(self)
        nn.init.zeros_(self.mlp.down.weight)

    def forward(self, f_BDYX: Tensor) -> tuple[Tensor, Tensor]:
        """[B, D, Y, X] -> mu, logvar, both [B, C, Y, X] fp32; logvar is clamped to [-30, 20]."""
        x_BND = f_BDYX.flatten(2).transpose(1, 2)
        x_BND = self.skip(x_BND) + self.attention(self.attention_norm(x_BND))
        x_BND = x_BND + self.mlp(self.mlp_norm(x_BND))
        moments: Tensor = self.to_moments(x_BND).float().transpose(1, 2)
        mu_BCYX, logvar_BCYX = moments.reshape(len(moments), -1, *f_BDYX.shape[2:]).chunk(2, dim=1)
        return mu_BCYX, logvar_BCYX.clamp(LOGVAR_MIN, LOGVAR_MAX)


class BridgeDecoder(nn.Module):
    """VB_d: Linear, pre-norm transformer layers, Linear; no final norm."""

    def __init__(self, config: BridgeConfig, width: int) -> None:
        super().__init__()
        mlp_width = round(width * config.decoder_mlp_ratio)
        self.activation_checkpointing = False
        self.embed = nn.Linear(config.latent_channels, width)
        self.layers = nn.ModuleList(
            Layer(width, config.num_heads, mlp_width, NORM_EPS) for _ in range(config.decoder_layers)
        )
        self.out = nn.Linear(width, width)
        init_linears(self)

    def forward(self, z_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> f_hat [B, D, Y, X] fp32."""
        x_BND = self.embed(z_BCYX.flatten(2).transpose(1, 2))
        x_BND = run_layers(self.layers, x_BND, self.activation_checkpointing)
        f_BND: Tensor = self.out(x_BND).float()
        return f_BND.transpose(1, 2).reshape(len(f_BND), -1, *z_BCYX.shape[2:])


class Bridge(nn.Module):
    """The Variational Bridge: VB_e and VB_d."""

    def __init__(self, config: BridgeConfig, width: int) -> None:
        super().__init__()
        self.encoder = BridgeEncoder(config, width)
        self.decoder = BridgeDecoder(config, width)


def sample_latent(mu_BCYX: Tensor, logvar_BCYX: Tensor, generator: torch.Generator) -> Tensor:
    """Draws z = mu + exp(logvar / 2) eps, eps ~ N(0, I), [B, C, Y, X] (reparameterisation, Kingma and Welling 2014)."""
    eps = torch.randn(mu_BCYX.shape, generator=generator, device=mu_BCYX.device, dtype=mu_BCYX.dtype)
    return mu_BCYX + torch.exp(0.5 * logvar_BCYX) * eps
