"""Sizes of decoders, baselines and generators, to the digit, without allocating them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from base import config as configs
from data.shards import LatentInfo
from generator.class_conditional.model import new_generator
from generator.model import Generator
from launch.runs.configs import ClassRun, GeneratorRun
from tokenizer.cnn_decoder import CnnDecoder
from tokenizer.config import PixelDecoderConfig
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.pixel_decoder import PixelDecoder

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


@pytest.mark.parametrize(
    ("name", "count", "trained"),
    [("t2i_cc12m", 853_086_656, 838_403_840), ("t2i_cc12m_ddt", 1_019_278_272, 1_004_595_456)],
)
def test_the_papers_generator(name: str, count: int, trained: int) -> None:
    """Qwen2.5-0.5B twice (494,032,768, its embedding once) with QK-norms, and what latents enter and leave by."""
    path = Path(__file__).parents[3] / "configs" / "generator" / f"{name}.yaml"
    run = configs.load(GeneratorRun, path)
    with torch.device("meta"):
        model = Generator(run.generator, LatentInfo("bf16", (64, 16, 16), (0.0,) * 64, (1.0,) * 64, "", ""))
    embedding, qk_norms = 151_936 * 896, 2 * 24 * 2 * 64
    assert num_parameters(model.backbone) == 2 * 494_032_768 - embedding + qk_norms
    time_embedding = 256 * 896 + 896 + 896 * 896 + 896
    assert num_parameters(model.latent_embedding) == 64 * 896 + 896 + time_embedding
    if model.head is not None:
        width, inner = 2048, 5461
        entrance = 64 * width + width + 256 * width + width + width * width + width + 896 * width + width
        layer = 10 * (width * width + width) + 2 * 128 + 3 * width * inner  # modulation 6, qkv 3, out 1
        assert num_parameters(model.head) == entrance + 2 * layer + 2 * (width * width + width)
    assert num_parameters(model) == count
    frozen = (
        896 * 896 + 896 + 64 + 896 * 896 + 896 + 3 * 896 * 4864 + 896
    )  # the last layer's, read by a text loss
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained == count - frozen


@pytest.mark.parametrize(
    ("names", "channels", "count"),
    [
        (["rpiae64_80"], 64, 675_629_696),  # the paper's 675.63 M
        (["rpiae64_80", "parts/size_l"], 64, 458_484_000),
        (["rpiae64_80", "parts/size_b"], 64, 130_803_776),
        (["rpiae64_80", "parts/size_s"], 64, 33_109_952),
        (["rae_b_80"], 768, 677_252_416),
        (["ditdh_raw_adaptive"], 768, 838_675_796),  # the paper's 839 M
    ],
)
def test_class_conditional_generators(names: list[str], channels: int, count: int) -> None:
    """Positions and the frequencies of time, which are fixed, are counted, as in the published code."""
    folder = Path(__file__).parents[3] / "configs" / "generator" / "class"
    config = configs.load(ClassRun, [folder / f"{name}.yaml" for name in names]).generator
    latents = LatentInfo("bf16", (channels, 16, 16), (0.0,) * channels, (1.0,) * channels, "", "")
    with torch.device("meta"):
        model = new_generator(config, latents)

    def block(width: int, heads: int) -> int:
        inner = 8 * width // 3
        norms = 2 * width + (2 * width // heads if config.qk_norm else 0)
        mlp = 2 * inner * (width + 1) + width * (inner + 1)
        return norms + mlp + 4 * width * (width + 1) + 6 * width * (width + 1)

    width, head = config.width, config.head
    entrance = channels * width + width + 512 * width + width + width * width + width + 1001 * width
    layers, last = config.num_layers * block(width, config.num_heads), width
    if head is not None:
        entrance += channels * head.width + head.width + width * head.width + head.width
        layers, last = layers + head.num_layers * block(head.width, head.num_heads), head.width
    exit_ = last + channels * (last + 1) + 2 * last * (last + 1)
    fixed = 256 * width + 256
    assert num_parameters(model) == entrance + layers + exit_ + fixed == count
    assert sum(p.numel() for p in model.parameters() if not p.requires_grad) == fixed
