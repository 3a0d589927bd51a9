"""The tokenizer's modules against transformers, torch and lpips, on tiny models with random weights."""

from __future__ import annotations

from collections.abc import Mapping

import lpips
import pytest
import torch
import torchvision
from torch import Tensor, nn

from helpers.weights import randomise
from tokenizer.bridge import Bridge
from tokenizer.config import BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.pixel_decoder import PixelDecoder, sincos_positions
from tokenizer.representation import Representation
from tokenizer.training.discriminator import SpectralConv1d
from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.transformer import Layer, SelfAttention

# fp32 with the same operations in another order (fused or separate projections, kernels): a few roundings of
# 1e-7 per layer, over three layers.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def first(state: Mapping[str, Tensor], *names: str) -> Tensor:
    """transformers renamed layers between 4.x and 5.x: the first of `names` that exists."""
    return next(state[name] for name in names if name in state)


def fused_qkv(state: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    pairs = (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    names = [(f"{prefix}.{new}.{kind}", f"{prefix}.attention.{old}.{kind}") for new, old in pairs]
    return torch.cat([first(state, *pair) for pair in names])


def attention_out(state: Mapping[str, Tensor], prefix: str, kind: str) -> Tensor:
    return first(state, f"{prefix}.o_proj.{kind}", f"{prefix}.output.dense.{kind}")


def test_representation_is_dinov2_with_registers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Dinov2WithRegistersModel(
        transformers.Dinov2WithRegistersConfig(
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=3,
            image_size=28,
            patch_size=7,
            num_register_tokens=4,
        )
    ).eval()
    randomise(theirs)
    with torch.no_grad():  # the last norm has no affine here
        theirs.layernorm.weight.fill_(1.0)
        theirs.layernorm.bias.fill_(0.0)
    ours = Representation(
        RepresentationConfig(
            name="vit_base_patch14_reg4_dinov2",
            input_px=28,
            weights="random",
            overrides={"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 3, "num_heads": 3},
        )
    )
    state = theirs.state_dict()
    positions = state["embeddings.position_embeddings"]
    tensors = {
        "cls_token": state["embeddings.cls_token"] + positions[:, :1],
        "reg_token": state["embeddings.register_tokens"],
        "pos_embed": positions[:, 1:],
        "patch_embed.proj.weight": state["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": state["embeddings.patch_embeddings.projection.bias"],
    }
    for i in range(3):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        for kind in ("weight", "bias"):
            tensors[f"{block}.attn.qkv.{kind}"] = fused_qkv(state, f"{layer}.attention", kind)
            tensors[f"{block}.attn.proj.{kind}"] = attention_out(state, f"{layer}.attention", kind)
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                tensors[f"{block}.{name}.{kind}"] = state[f"{layer}.{name}.{kind}"]
        tensors[f"{block}.ls1.gamma"] = state[f"{layer}.layer_scale1.lambda1"]
        tensors[f"{block}.ls2.gamma"] = state[f"{layer}.layer_scale2.lambda1"]
    ours.vit.load_state_dict(tensors)
    pixels_01 = torch.rand(2, 3, 28, 28)
    normalised = (pixels_01 - torch.tensor(ours.mean).view(3, 1, 1)) / torch.tensor(ours.std).view(3, 1, 1)
    with torch.no_grad():
        patches = theirs(normalised).last_hidden_state[:, 5:]  # class token and four registers dropped
        torch.testing.assert_close(ours(pixels_01).flatten(2).transpose(1, 2), patches, **TOLERANCE)


def test_pixel_decoder_is_the_mae_decoder() -> None:
    vit_mae = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    config = vit_mae.ViTMAEConfig(
        hidden_size=48,
        decoder_hidden_size=64,
        decoder_num_hidden_layers=3,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    theirs = vit_mae.ViTMAEDecoder(config, num_patches=16).eval()
    positions = sincos_positions(64, (4, 4))
    torch.testing.assert_close(positions, theirs.decoder_pos_embed.data)  # sin and cos in fp64, then fp32
    randomise(theirs)
    theirs.decoder_pos_embed.data.copy_(positions)
    ours = PixelDecoder(PixelDecoderConfig(64, 3, 4, 128, 8), 48, (4, 4), (0.0,) * 3, (1.0,) * 3)
    state = theirs.state_dict()
    class_input = torch.randn(1, 1, 48)
    tensors = {"class_token": theirs.decoder_embed(class_input).detach()}
    for kind in ("weight", "bias"):
        for mine, name in (
            ("embed", "decoder_embed"),
            ("norm", "decoder_norm"),
            ("to_pixels", "decoder_pred"),
        ):
            tensors[f"{mine}.{kind}"] = state[f"{name}.{kind}"]
        for i in range(3):
            layer = f"decoder_layers.{i}"
            tensors[f"layers.{i}.attention_norm.{kind}"] = state[f"{layer}.layernorm_before.{kind}"]
            tensors[f"layers.{i}.mlp_norm.{kind}"] = state[f"{layer}.layernorm_after.{kind}"]
            tensors[f"layers.{i}.attention.qkv.{kind}"] = fused_qkv(state, f"{layer}.attention", kind)
            tensors[f"layers.{i}.attention.out.{kind}"] = attention_out(state, f"{layer}.attention", kind)
            up, down = (f"{layer}.mlp.fc1.{kind}", f"{layer}.mlp.fc2.{kind}")
            tensors[f"layers.{i}.mlp.up.{kind}"] = first(state, up, f"{layer}.intermediate.dense.{kind}")
            tensors[f"layers.{i}.mlp.down.{kind}"] = first(state, down, f"{layer}.output.dense.{kind}")
    ours.load_state_dict(tensors)
    f = torch.randn(2, 48, 4, 4)
    tokens = torch.cat([class_input.expand(2, -1, -1), f.flatten(2).transpose(1, 2)], dim=1)
    with torch.no_grad():
        patches = theirs(tokens, ids_restore=torch.arange(16).expand(2, -1)).logits
        # MAE's unpatchify: (row, column, channel) inside a patch.
        expected = patches.view(2, 4, 4, 8, 8, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 32, 32)
        torch.testing.assert_close(ours(f), expected, **TOLERANCE)


def copy_attention(mine: SelfAttention, theirs: nn.MultiheadAttention) -> None:
    mine.qkv.load_state_dict({"weight": theirs.in_proj_weight, "bias": theirs.in_proj_bias})
    mine.out.load_state_dict(theirs.out_proj.state_dict())


def test_bridge_decoder_is_a_stack_of_torch_prenorm_layers() -> None:
    bridge = Bridge(BridgeConfig(latent_channels=6, decoder_layers=3, num_heads=4), 48)
    layers = nn.ModuleList(
        nn.TransformerEncoderLayer(
            48, 4, 192, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        for _ in range(3)
    )
    randomise(layers)
    for mine, theirs in zip(bridge.decoder.layers, layers, strict=True):
        assert isinstance(mine, Layer) and isinstance(theirs, nn.TransformerEncoderLayer)
        copy_attention(mine.attention, theirs.self_attn)
        pairs = (
            (mine.attention_norm, theirs.norm1),
            (mine.mlp_norm, theirs.norm2),
            (mine.mlp.up, theirs.linear1),
            (mine.mlp.down, theirs.linear2),
        )
        for own, other in pairs:
            own.load_state_dict(other.state_dict())
    z = torch.randn(2, 6, 4, 4)
    with torch.no_grad():
        x = bridge.decoder.embed(z.flatten(2).transpose(1, 2))
        for layer in layers:
            x = layer(x)
        expected = bridge.decoder.out(x).transpose(1, 2).reshape(2, 48, 4, 4)
        torch.testing.assert_close(bridge.decoder(z), expected, **TOLERANCE)


def test_bridge_encoder_is_the_published_block() -> None:
    encoder = Bridge(BridgeConfig(latent_channels=6, num_heads=4), 48).encoder
    randomise(encoder)
    attention = nn.MultiheadAttention(48, 4, batch_first=True)
    randomise(attention)
    copy_attention(encoder.attention, attention)
    f = torch.randn(2, 48, 4, 4)
    with torch.no_grad():
        x = f.flatten(2).transpose(1, 2)
        x1 = encoder.attention_norm(x)
        x = encoder.skip(x) + attention(x1, x1, x1, need_weights=False)[0]
        x = x + encoder.mlp.down(nn.functional.gelu(encoder.mlp.up(encoder.mlp_norm(x))))
        moments = encoder.to_moments(x).transpose(1, 2).reshape(2, 12, 4, 4)
        mu, logvar = encoder(f)
        torch.testing.assert_close(mu, moments[:, :6], **TOLERANCE)
        torch.testing.assert_close(logvar, moments[:, 6:].clamp(-30.0, 20.0), **TOLERANCE)


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


# lpips asks torchvision for weights through arguments that torchvision calls deprecated.
@pytest.mark.filterwarnings("ignore:The parameter 'pretrained'", "ignore:Arguments other than a weight enum")
def test_lpips_equals_the_lpips_package() -> None:
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    torchvisions = torchvision.models.vgg16(weights=None, init_weights=False).features[:30]
    for layer, other in zip(_convolutions(torchvisions), _convolutions(theirs.net), strict=True):
        layer.load_state_dict(other.state_dict())
    ours = LpipsVgg16()
    ours.vgg.load_state_dict(torchvisions.state_dict())  # the names of torchvision's layout
    pixels_01, other_01 = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = theirs(pixels_01, other_01, normalize=True).flatten()
        assert float(expected.min()) > 0
        torch.testing.assert_close(ours(pixels_01, ours.reference(other_01)), expected, **TOLERANCE)


def test_spectral_convolution_equals_torchs() -> None:
    ours = SpectralConv1d(12, 8, 3)
    plain = nn.Conv1d(12, 8, 3, padding=1, padding_mode="circular")
    plain.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    theirs = nn.utils.parametrizations.spectral_norm(plain, n_power_iterations=200)
    for _ in range(200):
        ours.step_power_iteration()
    x = torch.randn(2, 12, 9)
    torch.testing.assert_close(ours(x), theirs(x), **TOLERANCE)
    # Both differentiate through the norm with the singular vectors held fixed.
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    original = theirs.parametrizations.weight.original
    torch.testing.assert_close(ours.weight.grad, original.grad, rtol=1e-3, atol=1e-4)
