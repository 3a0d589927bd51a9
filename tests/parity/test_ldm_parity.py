"""VA-VAE's checkpoint through our import computes what LDM's autoencoder computes.

The reference is LDM's autoencoder (Rombach et al. 2022) as plain functions of its state dict: two residual
blocks a level in the encoder, three in the decoder, attention at the coarsest level and in the middle.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.releases import kl as releases
from tokenizer.releases.kl import import_va_vae

CHANNELS = (32, 32, 64)
LATENT = 5
Weights = dict[str, Tensor]


def norm(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.group_norm(x, 32, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-6)


def conv(weights: Weights, name: str, x: Tensor, stride: int = 1, padding: int | None = None) -> Tensor:
    weight = weights[f"{name}.weight"]
    padding = weight.shape[-1] // 2 if padding is None else padding
    return F.conv2d(x, weight, weights[f"{name}.bias"], stride=stride, padding=padding)


def block(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = conv(weights, f"{name}.conv1", F.silu(norm(weights, f"{name}.norm1", x)))
    h = conv(weights, f"{name}.conv2", F.silu(norm(weights, f"{name}.norm2", h)))
    shortcut = f"{name}.nin_shortcut"
    return h + (conv(weights, shortcut, x) if f"{shortcut}.weight" in weights else x)


def attention(weights: Weights, name: str, x: Tensor) -> Tensor:
    h = norm(weights, f"{name}.norm", x)
    q, k, v = (conv(weights, f"{name}.{part}", h).flatten(2) for part in "qkv")
    scores = torch.einsum("bcn,bcm->bnm", q, k) / q.shape[1] ** 0.5
    mixed = torch.einsum("bnm,bcm->bcn", scores.softmax(dim=-1), v).view_as(x)
    return x + conv(weights, f"{name}.proj_out", mixed)


def middle(weights: Weights, side: str, x: Tensor) -> Tensor:
    x = block(weights, f"{side}.mid.block_1", x)
    return block(weights, f"{side}.mid.block_2", attention(weights, f"{side}.mid.attn_1", x))


def end(weights: Weights, side: str, x: Tensor) -> Tensor:
    return conv(weights, f"{side}.conv_out", F.silu(norm(weights, f"{side}.norm_out", x)))


def encode(weights: Weights, pixels: Tensor) -> Tensor:
    x = conv(weights, "encoder.conv_in", pixels)
    last = len(CHANNELS) - 1
    for level in range(len(CHANNELS)):
        for index in range(2):
            x = block(weights, f"encoder.down.{level}.block.{index}", x)
            if level == last:
                x = attention(weights, f"encoder.down.{level}.attn.{index}", x)
        if level != last:
            x = conv(
                weights, f"encoder.down.{level}.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2, padding=0
            )
    moments = conv(weights, "quant_conv", end(weights, "encoder", middle(weights, "encoder", x)))
    return moments.chunk(2, dim=1)[0]


def decode(weights: Weights, z: Tensor) -> Tensor:
    x = middle(weights, "decoder", conv(weights, "decoder.conv_in", conv(weights, "post_quant_conv", z)))
    last = len(CHANNELS) - 1
    for level in reversed(range(len(CHANNELS))):
        for index in range(3):
            x = block(weights, f"decoder.up.{level}.block.{index}", x)
            if level == last:
                x = attention(weights, f"decoder.up.{level}.attn.{index}", x)
        if level != 0:
            x = conv(weights, f"decoder.up.{level}.upsample.conv", F.interpolate(x, scale_factor=2.0))
    return end(weights, "decoder", x)


def random_weights() -> Weights:
    """Every tensor of the layout, under LDM's names."""
    noise = torch.Generator().manual_seed(0)
    weights: Weights = {}

    def add_norm(name: str, channels: int) -> None:
        weights[f"{name}.weight"] = 1 + 0.1 * torch.randn(channels, generator=noise)
        weights[f"{name}.bias"] = 0.1 * torch.randn(channels, generator=noise)

    def add_conv(name: str, inputs: int, outputs: int, side: int = 3) -> None:
        scale = (inputs * side * side) ** -0.5
        weights[f"{name}.weight"] = scale * torch.randn(outputs, inputs, side, side, generator=noise)
        weights[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=noise)

    def add_block(name: str, inputs: int, outputs: int) -> None:
        add_norm(f"{name}.norm1", inputs)
        add_conv(f"{name}.conv1", inputs, outputs)
        add_norm(f"{name}.norm2", outputs)
        add_conv(f"{name}.conv2", outputs, outputs)
        if inputs != outputs:
            add_conv(f"{name}.nin_shortcut", inputs, outputs, 1)

    def add_attention(name: str, channels: int) -> None:
        add_norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            add_conv(f"{name}.{part}", channels, channels, 1)

    last, deepest = len(CHANNELS) - 1, CHANNELS[-1]
    for side, outputs in (("encoder", 2 * LATENT), ("decoder", 3)):
        add_block(f"{side}.mid.block_1", deepest, deepest)
        add_attention(f"{side}.mid.attn_1", deepest)
        add_block(f"{side}.mid.block_2", deepest, deepest)
        width = deepest if side == "encoder" else CHANNELS[0]
        add_norm(f"{side}.norm_out", width)
        add_conv(f"{side}.conv_out", width, outputs)
    add_conv("encoder.conv_in", 3, CHANNELS[0])
    add_conv("decoder.conv_in", LATENT, deepest)
    add_conv("quant_conv", 2 * LATENT, 2 * LATENT, 1)
    add_conv("post_quant_conv", LATENT, LATENT, 1)
    width = CHANNELS[0]
    for level, channels in enumerate(CHANNELS):
        for index in range(2):
            add_block(f"encoder.down.{level}.block.{index}", width, channels)
            width = channels
            if level == last:
                add_attention(f"encoder.down.{level}.attn.{index}", channels)
        if level != last:
            add_conv(f"encoder.down.{level}.downsample.conv", channels, channels)
    for level, channels in reversed(list(enumerate(CHANNELS))):
        for index in range(3):
            add_block(f"decoder.up.{level}.block.{index}", width, channels)
            width = channels
            if level == last:
                add_attention(f"decoder.up.{level}.attn.{index}", channels)
        if level != 0:
            add_conv(f"decoder.up.{level}.upsample.conv", channels, channels)
    return weights


def test_imported_va_vae_equals_ldms_autoencoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "LDM_CHANNELS", CHANNELS)
    weights = random_weights()
    training_only = {
        "loss.discriminator.weight": torch.zeros(2),
        "foundation_model.model.cls": torch.zeros(1),
    }
    torch.save({"state_dict": weights | training_only}, tmp_path / "va-vae.pt")
    imported = import_va_vae(tmp_path / "va-vae.pt", image_px=32)
    assert imported.report.problems == () and len(imported.report.left_out) == 2
    model = imported.build()
    assert model.latent_shape == (LATENT, 8, 8)
    pixels_01 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z, expected = model.encode(pixels_01), encode(weights, 2 * pixels_01 - 1)
        pixels, expected_pixels = model.decode(z), (decode(weights, expected) + 1) / 2
    # fp32 sums in another order, up to 20 layers deep; found: 2e-6 and 7e-6.
    torch.testing.assert_close(z, expected, atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(pixels, expected_pixels, atol=3e-5, rtol=1e-5)
