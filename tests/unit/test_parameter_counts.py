"""Sizes of decoders and baselines, to the digit, without allocating them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tokenizer.cnn_decoder import CnnDecoder
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.pixel_decoder import PixelDecoder, PixelDecoderConfig

SD = (128, 256, 512, 512)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (PixelDecoderConfig(768, 12, 12, 3072), 86_237_952),  # RAE's configs/decoder/ViTB
        (PixelDecoderConfig(1024, 24, 16, 4096), 303_887_104),  # ViTL
    ],
    ids=["ViT-B", "ViT-L"],
)
def test_smaller_vit_decoders(config: PixelDecoderConfig, count: int) -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(config, 768, (16, 16), (0.5,) * 3, (0.5,) * 3)
    width, mlp = config.width, config.mlp_width
    layer = 4 * width * width + 2 * width * mlp + 4 * width + width + mlp + 4 * width
    rest = 769 * width + width + 2 * width + 768 * (width + 1)  # embedding, class token, norm, pixels
    assert num_parameters(decoder) == config.layers * layer + rest == count


def test_cnn_decoder_has_the_papers_44_8_million() -> None:
    with torch.device("meta"):
        decoder = CnnDecoder(PixelDecoderConfig(kind="cnn"), 768, (16, 16), (0.5,) * 3, (0.5,) * 3)
    assert num_parameters(decoder) == 44_809_091
    assert num_parameters(decoder.net.up_blocks[0].attentions) == 3 * (4 * (512 * 512 + 512) + 2 * 512)


@pytest.mark.parametrize(
    ("config", "count", "shape"),
    [
        (KlConfig(256, 4, SD), 83_653_863, (4, 32, 32)),
        (KlConfig(256, 16, SD, quant_conv=False, post_quant_conv=False), 83_819_683, (16, 32, 32)),
        (KlConfig(256, 32, (128, 128, 256, 256, 512), coarsest_attention=True), 69_836_067, (32, 16, 16)),
    ],
    ids=["sd", "flux", "va"],
)
def test_baselines(config: KlConfig, count: int, shape: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = KlAutoencoder(config)
    assert model.latent_shape == shape
    assert num_parameters(model) == count
