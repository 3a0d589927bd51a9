"""The tokenizer's loss terms (paper 3.2 and 3.3; docs/method.md), each a mean over its elements.

Shapes: B batch, D feature width, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.training.stage_config import NoiseLaw, PivotLoss


def reconstruction(pixels_hat: Tensor, pixels_01: Tensor) -> Tensor:
    """L_rec = mean |x_hat - x|."""
    return F.l1_loss(pixels_hat, pixels_01)


def pivot(f_BDYX: Tensor, pivot_BDYX: Tensor, kind: PivotLoss) -> Tensor:
    """L_piv = mean (f - f_p)^2; "normalised" (the ablation Norm-L2) scales every token to length 1 first."""
    if kind == "normalised":
        f_BDYX, pivot_BDYX = F.normalize(f_BDYX, dim=1), F.normalize(pivot_BDYX, dim=1)
    return F.mse_loss(f_BDYX, pivot_BDYX)


def kl(mu_BCYX: Tensor, logvar_BCYX: Tensor) -> Tensor:
    """Mean over all elements of mu^2 + sigma^2 - 1 - logvar, that is 2 KL(q || N(0, I)) (as released)."""
    return (mu_BCYX.square() + logvar_BCYX.exp() - 1.0 - logvar_BCYX).mean()


def generator_hinge(logits_fake: Tensor) -> Tensor:
    """L_GAN of the decoder: -mean(logits)."""
    return -logits_fake.mean()


def discriminator_hinge(logits_real: Tensor, logits_fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator: mean of max(0, 1 - real) and max(0, 1 + fake) (Lim and Ye 2017)."""
    return 0.5 * (F.relu(1.0 - logits_real).mean() + F.relu(1.0 + logits_fake).mean())


def add_noise(f_BDYX: Tensor, tau: float, law: NoiseLaw, generator: torch.Generator) -> Tensor:
    """f + sigma eps with one sigma per sample: |N(0, tau^2)| (paper, RAE) or tau U(0, 1) (release)."""
    if tau == 0.0:
        return f_BDYX
    draw = torch.randn if law == "gaussian" else torch.rand
    sigma_B111 = tau * draw(len(f_BDYX), 1, 1, 1, generator=generator, device=f_BDYX.device).abs()
    eps_BDYX = torch.randn(f_BDYX.shape, generator=generator, device=f_BDYX.device)
    return f_BDYX + sigma_B111 * eps_BDYX


def quantise(pixels_hat: Tensor) -> Tensor:
    """Clamps to [0, 1] and rounds to 8 bits, as a saved image would be."""
    return pixels_hat.clamp(0.0, 1.0).mul(255.0).round().div(255.0)


def psnr_db(pixels_hat: Tensor, pixels_01: Tensor) -> Tensor:
    """PSNR of each clamped image in dB, [B]; an error below 1e-10 counts as 100 dB."""
    mse_B = (pixels_hat.clamp(0.0, 1.0) - pixels_01).square().flatten(1).mean(dim=1)
    return -10.0 * mse_B.clamp(min=1e-10).log10()
