"""Modules of the autoencoder: sizes to the digit, shapes, saving and loading."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from base.config import ConfigError, UserError
from helpers.stages import BRIDGE, PLAIN, VIT
from tokenizer.bridge import Bridge, sample_latent
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.export import fingerprint
from tokenizer.pixel_decoder import PixelDecoder
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder
from tokenizer.weights import state_hash

SMALL = dataclasses.replace(PLAIN, bridge=BRIDGE)
DINOV2 = "vit_base_patch14_reg4_dinov2.lvd142m"


def small_autoencoder(config: AutoencoderConfig = SMALL, seed: int = 0) -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Autoencoder(config)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pixels(count: int = 2, px: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, px, px, generator=torch.Generator().manual_seed(1))


def test_dinov2_has_the_parameters_of_the_paper() -> None:
    overrides: dict[str, int | float | bool | str] = {"img_size": 518, "dynamic_img_size": True}
    with torch.device("meta"):
        model = Representation(RepresentationConfig(DINOV2, 224, "random", overrides))
    # The paper's 86,582,016 is transformers' layout. timm has no mask token, and its class token already
    # contains its position: two vectors of 768 fewer.
    assert num_parameters(model) == 86_582_016 - 2 * 768
    assert (model.width, model.grid, model.depth) == (768, (16, 16), 12)


def test_dinov2_at_224_px_stores_the_positions_of_its_own_grid() -> None:
    with torch.device("meta"):
        model = Representation(RepresentationConfig(DINOV2, 224, "random", {"img_size": 224}))
    assert num_parameters(model) == 86_582_016 - 2 * 768 - (37 * 37 - 16 * 16) * 768
    assert model.grid == (16, 16)


def test_bridge_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        bridge = Bridge(BridgeConfig(), 768)
    assert num_parameters(bridge.encoder) == 4_235_648
    assert num_parameters(bridge.decoder) == 43_167_744


def test_pixel_decoder_xl_has_the_parameters_of_the_paper() -> None:
    with torch.device("meta"):
        decoder = PixelDecoder(PixelDecoderConfig(), 768, (16, 16), (0.5,) * 3, (0.5,) * 3)
    assert decoder.positions.numel() == 257 * 1152  # fixed; the paper's count includes them
    assert num_parameters(decoder) + decoder.positions.numel() == 415_352_704


def test_features_are_normalised_patch_tokens_on_the_grid() -> None:
    model = small_autoencoder()
    f = model.features(pixels())
    assert f.shape == (2, 48, 4, 4)
    # A LayerNorm without affine: mean 0 and variance 1 over the width, up to its epsilon of 1e-6.
    torch.testing.assert_close(f.mean(dim=1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(f.var(dim=1, unbiased=False), torch.ones(2, 4, 4), atol=1e-4, rtol=0)


def test_features_follow_the_image_in_row_major_order() -> None:
    model = small_autoencoder().encoder
    model.vit.blocks = nn.Sequential()  # without attention a token sees its own patch only
    image = pixels(1)
    changed = image.clone()
    changed[:, :, 8:16, 24:32] += 0.5  # the patch in row 1, column 3
    difference = (model(image) - model(changed)).abs().sum(dim=1)[0]
    assert difference.nonzero().tolist() == [[1, 3]]


def test_images_are_resized_to_the_representation_models_input() -> None:
    config = dataclasses.replace(VIT, input_px=24, overrides={**VIT.overrides, "img_size": 24})
    assert Representation(config)(pixels(px=32)).shape == (2, 48, 3, 3)


def test_decoder_puts_each_token_on_its_square_and_unnormalises() -> None:
    config = dataclasses.replace(SMALL.decoder, layers=0)
    decoder = PixelDecoder(config, 48, (4, 4), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    with torch.no_grad():
        decoder.to_pixels.weight.zero_()
        # A patch is stored (row, column, channel): mark row 2, column 5, channel 1.
        decoder.to_pixels.bias.zero_()[(2 * 8 + 5) * 3 + 1] = 1.0
        image = decoder(torch.zeros(1, 48, 4, 4))[0]
    expected = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1).expand(3, 32, 32).clone()
    expected[1, 2::8, 5::8] += 2.0
    torch.testing.assert_close(image, expected)


def test_decoder_tells_positions_apart() -> None:
    model = small_autoencoder()
    image = model.decoder(torch.zeros(1, 48, 4, 4))
    squares = image.view(3, 4, 8, 4, 8).permute(1, 3, 0, 2, 4).reshape(16, -1)
    assert len({tuple(square.tolist()) for square in squares}) == 16


def test_bridge_starts_with_its_mlp_switched_off() -> None:
    bridge = small_autoencoder().bridge
    assert bridge is not None
    x = torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(bridge.encoder.mlp(x), torch.zeros_like(x))


def test_latent_sample_has_the_posteriors_mean_and_deviation() -> None:
    mu, logvar = torch.full((1, 1, 200, 200), 2.0), torch.full((1, 1, 200, 200), -1.0)
    z = sample_latent(mu, logvar, torch.Generator().manual_seed(3))
    # 40,000 draws: the standard error of the mean is 0.003, of the deviation 0.002; five of them are allowed.
    assert abs(float(z.mean()) - 2.0) < 0.015
    assert abs(float(z.std()) - float(torch.tensor(-0.5).exp())) < 0.011


def test_latent_shape_is_what_encode_returns() -> None:
    with_bridge = small_autoencoder()
    without = small_autoencoder(dataclasses.replace(SMALL, bridge=None))
    for model, channels in ((with_bridge, 6), (without, 48)):
        z = model.encode(pixels())
        assert model.latent_shape == (channels, 4, 4) == tuple(z.shape[1:])
        assert model.decode(z).shape == (2, 3, 32, 32)


def test_saved_autoencoder_loads_equal_without_its_first_weights(tmp_path: Path) -> None:
    first_weights = tmp_path / "first.safetensors"
    save_file(small_autoencoder().encoder.vit.state_dict(), str(first_weights))
    representation = dataclasses.replace(VIT, weights=str(first_weights))
    model = small_autoencoder(dataclasses.replace(SMALL, representation=representation))
    model.save(tmp_path / "export")
    first_weights.unlink()
    loaded = Autoencoder.load(tmp_path / "export")
    assert state_hash(loaded) == state_hash(model)
    assert torch.equal(loaded.decode(loaded.encode(pixels())), model.decode(model.encode(pixels())))


def test_fingerprint_follows_weights_and_shape_only(tmp_path: Path) -> None:
    model = small_autoencoder()
    model.save(tmp_path / "a")
    model.save(tmp_path / "b", provenance={"note": "another run"})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    with torch.no_grad():
        model.decoder.norm.bias[0] += 1e-3
    model.save(tmp_path / "c")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")


def test_wrong_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    small_autoencoder().save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["surplus"] = tensors.pop("decoder.norm.bias")
    tensors["decoder.embed.bias"] = torch.zeros(3)
    save_file(tensors, str(tmp_path / "model.safetensors"))
    with pytest.raises(UserError) as caught:
        Autoencoder.load(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert "missing: decoder.norm.bias" in message
    assert "unexpected: surplus" in message
    assert "decoder.embed.bias [3] instead of [64]" in message


@pytest.mark.parametrize("content", [None, "not json", "{}", '{"format_version": 99, "autoencoder": {}}'])
def test_no_autoencoder_is_one_clear_line(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError) as caught:
        Autoencoder.load(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_truncated_weights_are_refused(tmp_path: Path) -> None:
    small_autoencoder().save(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors: not a readable safetensors file"):
        Autoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_px": 64}, "image_px is 64, but 4x4 tokens"),
        ({"bridge": BridgeConfig(num_heads=7)}, "num_heads 7 does not divide the feature width 48"),
        ({"representation": dataclasses.replace(VIT, input_px=30)}, "no multiple of the patch"),
        (
            {"representation": dataclasses.replace(VIT, name="vit_huge_typo")},
            "cannot build 'vit_huge_typo'",
        ),
        (
            {"representation": dataclasses.replace(VIT, name="resnet18", overrides={})},
            "not a plain timm",
        ),
        (
            {"representation": dataclasses.replace(VIT, weights="/nowhere.safetensors")},
            "no such weights file",
        ),
        ({"decoder": dataclasses.replace(SMALL.decoder, heads=5)}, "multiple of 4 and of heads 5"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Autoencoder(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]


def test_depths_outside_the_model_are_refused() -> None:
    model = small_autoencoder().encoder
    for depths in ((), (2, 1), (0, 3), (-1,)):
        with pytest.raises(ConfigError, match="must increase within"):
            model.check_depths(depths, "test")
