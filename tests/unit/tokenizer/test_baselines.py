"""The CNN decoder and the convolutional VAEs: shapes, saving, loading by folder, imports from diffusers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from base import files
from base.config import ConfigError, UserError, from_dict, to_dict
from data.samples.images import PixelBatch
from tokenizer.autoencoders import load_autoencoder
from tokenizer.cnn_decoder import CnnDecoder
from tokenizer.config import AutoencoderConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.export import fingerprint
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.releases.kl import import_diffusers
from tokenizer.rpiae import Autoencoder
from tokenizer.training.build_stage import build_stage
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig, StageConfig
from tokenizer.weights import state_hash

VIT = RepresentationConfig(
    name="vit_tiny_patch16_224",
    input_px=32,
    weights="random",
    overrides={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
)
CNN = AutoencoderConfig(
    representation=VIT,
    decoder=PixelDecoderConfig(
        kind="cnn", base_channels=32, channel_multipliers=(1, 1, 2, 2), blocks_per_level=2, patch_px=8
    ),
    image_px=32,
)
KL = KlConfig(image_px=32, latent_channels=4, block_channels=(32, 32, 64), blocks_per_level=1)
DIFFUSERS: dict[str, Any] = {
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "block_out_channels": [32, 32, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "scaling_factor": 0.5,
    "shift_factor": 0.25,
}


def pixels(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def seeded(config: AutoencoderConfig | KlConfig) -> Autoencoder | KlAutoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            Autoencoder(config) if isinstance(config, AutoencoderConfig) else KlAutoencoder(config)
        ).eval()


@pytest.mark.parametrize("config", [CNN, KL], ids=["cnn decoder", "kl"])
def test_any_autoencoder_is_loaded_by_its_folder(
    tmp_path: Path, config: AutoencoderConfig | KlConfig
) -> None:
    model = seeded(config)
    model.save(tmp_path, {"note": "test"})
    loaded = load_autoencoder(tmp_path)
    assert type(loaded) is type(model) and state_hash(loaded) == state_hash(model)
    with torch.no_grad():
        z = loaded.encode(pixels())
        assert tuple(z.shape[1:]) == loaded.latent_shape
        image = loaded.decode(z)
        assert torch.equal(image, model.decode(model.encode(pixels())))
    assert image.shape == (2, 3, 32, 32) and image.dtype == torch.float32


def test_an_export_of_another_kind_is_one_clear_line(tmp_path: Path) -> None:
    seeded(KL).save(tmp_path / "kl")
    seeded(CNN).save(tmp_path / "rae")
    with pytest.raises(UserError, match="holds a convolutional VAE; this needs an RPiAE"):
        Autoencoder.load(tmp_path / "kl")
    with pytest.raises(UserError, match="holds an RPiAE or an RAE"):
        KlAutoencoder.load(tmp_path / "rae")


def test_fingerprints_differ_by_kind_shape_and_weights_not_by_provenance(tmp_path: Path) -> None:
    model = seeded(KL)
    model.save(tmp_path / "a")
    model.save(tmp_path / "b", {"note": "another"})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b")
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    model.save(tmp_path / "c")
    assert fingerprint(tmp_path / "a") != fingerprint(tmp_path / "c")


def test_exports_from_before_there_were_kinds_keep_working_and_their_fingerprint(tmp_path: Path) -> None:
    decoder = PixelDecoderConfig(width=32, layers=1, heads=4, mlp_width=64, patch_px=8)
    model = seeded(dataclasses.replace(CNN, decoder=decoder))
    model.save(tmp_path)
    tree = files.read_json(tmp_path / "config.json")
    for later in ("kind", "base_channels", "channel_multipliers", "blocks_per_level"):
        del tree["autoencoder"]["decoder"][later]
    files.write_json(tmp_path / "config.json", tree)
    assert state_hash(load_autoencoder(tmp_path)) == state_hash(model)
    # What version 0.1 computed: the resolved config, which then had no more fields than the file.
    weights = files.sha256(tmp_path / "model.safetensors")
    assert fingerprint(tmp_path) == files.digest({"autoencoder": tree["autoencoder"], "weights": weights})


def test_cnn_decoder_unnormalises_and_shows_its_last_weight() -> None:
    decoder = CnnDecoder(CNN.decoder, 48, (4, 4), (0.1, 0.2, 0.3), (1.0, 2.0, 4.0))
    with torch.no_grad():
        decoder.last_weight.zero_()
        decoder.net.conv_out.bias.fill_(0.5)
        image = decoder(torch.zeros(1, 48, 4, 4))
    expected = torch.tensor([0.6, 1.2, 2.3]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    torch.testing.assert_close(image, expected)


def test_a_stage_trains_the_cnn_decoder_with_every_loss() -> None:
    stage = StageConfig(
        stage="pivot",
        autoencoder=CNN,
        perceptual=PerceptualConfig("representation", representation=VIT, depths=(0, 1)),
        discriminator=DiscriminatorConfig(VIT, depths=(0, 1)),
        adaptive_pivot_start_step=0,
    )
    objective = build_stage(stage)
    images = (pixels() * 255).to(torch.uint8)
    out = objective.loss(PixelBatch(images, ("a", "b"), 5, ({}, {})), step=0)
    assert float(out.metrics["lambda_gan"]) > 0
    out.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert all(parameter.grad is not None for parameter in objective.model.decoder.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_px": 16}, "image_px is 32, but 4x4 tokens"),
        ({"channel_multipliers": (1, 2)}, "2 channel_multipliers turn a token into 2 px, but patch_px is 8"),
        ({"base_channels": 48}, "base_channels 48 is no multiple of 32"),
    ],
)
def test_cnn_decoders_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    decoder = dataclasses.replace(CNN.decoder, **change)
    with pytest.raises(ConfigError, match=message):
        Autoencoder(dataclasses.replace(CNN, decoder=decoder))


def test_decoder_kind_is_one_word_in_the_yaml() -> None:
    tree = {**to_dict(CNN), "decoder": {"kind": "cnn"}}
    assert from_dict(AutoencoderConfig, tree).decoder == PixelDecoderConfig(kind="cnn")
    with pytest.raises(ConfigError, match="'vit' or 'cnn'"):
        from_dict(AutoencoderConfig, {**tree, "decoder": {"kind": "gan"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [({"image_px": 30}, "no multiple of 4"), ({"norm_groups": 24}, "no multiples of norm_groups 24")],
)
def test_kl_configs_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KlAutoencoder(dataclasses.replace(KL, **change))


@pytest.mark.parametrize("form", ["sd", "flux", "names of 2022"])
def test_diffusers_vaes_are_imported_with_raw_means(tmp_path: Path, form: str) -> None:
    """Flux has no quant convolutions; old files call the attention's projections query, key, value, proj_attn."""
    quant = {"use_quant_conv": False, "use_post_quant_conv": False} if form == "flux" else {}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = AutoencoderKL(**DIFFUSERS, **quant).eval()
    theirs.save_pretrained(tmp_path / "vae")
    if form == "names of 2022":
        path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
        renamed = load_file(path)
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            renamed = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in renamed.items()}
        save_file(renamed, str(path))
    imported = import_diffusers(str(tmp_path), 32, "vae")
    assert imported.report.problems == ()
    imported.build().save(tmp_path / "export", imported.provenance)
    model = load_autoencoder(tmp_path / "export")
    with torch.no_grad():
        mean = theirs.encode(2 * pixels() - 1).latent_dist.mean
        assert torch.equal(model.encode(pixels()), mean)  # neither scaling_factor nor shift_factor
        assert torch.equal(model.decode(mean), (theirs.decode(mean).sample + 1) / 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'; only 'silu'"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'"),
        (None, "no such file"),
    ],
)
def test_diffusers_folders_of_something_else_are_refused(
    tmp_path: Path, change: dict[str, str] | None, message: str
) -> None:
    AutoencoderKL(**DIFFUSERS).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    if change is None:
        path.unlink()
    else:
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        import_diffusers(str(tmp_path), 32)
