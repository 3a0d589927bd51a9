"""A stranger's export: with every leaf of every config replaced it is loaded or refused in one line, nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from base.config import ConfigError, UserError
from data.config import PixelConfig
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import LatentInfo
from evaluation.features.representation import RepresentationFeatures
from generator.class_conditional.model import DitConfig, create_generator, load_generator
from generator.config import GeneratorConfig, MotConfig
from generator.model import Generator
from generator.pretrained import load_pretrained
from generator.qwen import qwen_shape
from tokenizer.autoencoders import load_autoencoder
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.releases.kl import import_diffusers
from tokenizer.rpiae import Autoencoder

LATENTS = LatentInfo("fp32", (4, 3, 3), (0.5,) * 4, (2.0,) * 4, "autoencoder", "text")
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
QWEN = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e4},
}  # fmt: skip
DIFFUSERS = {
    "_class_name": "AutoencoderKL",
    "block_out_channels": [32],
    "norm_num_groups": 32,
    "layers_per_block": 1,
}
REPLACEMENTS = (0, -1, None, True, "x", [], {}, math.inf, math.nan, 1e60, -(10**30), [[[]]], "\ud83d")


def rpiae(folder: Path) -> None:
    decoder = PixelDecoderConfig(width=16, layers=1, heads=2, mlp_width=16, patch_px=8)
    representation = RepresentationConfig("dinov2-s", 32, "random", dict(VIT), std=(0.2, 0.2, 0.2))
    config = AutoencoderConfig(representation, decoder, 32, BridgeConfig(4, num_heads=2))
    Autoencoder(config).save(folder)


def qwen(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(QWEN))


def diffusers(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(DIFFUSERS))
    KlAutoencoder(KlConfig(32, 4, (32,), 1)).save(folder / "other")
    (folder / "other" / "model.safetensors").rename(folder / "diffusion_pytorch_model.safetensors")


def mot(folder: Path) -> None:
    backbone = MotConfig(32, 32, 1, 4, 2, 8, 48)
    Generator.uninitialised(GeneratorConfig(backbone, max_side=4), LATENTS).save(folder)


EXPORTS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "RPiAE": (rpiae, load_autoencoder),
    "RPiAE as features": (rpiae, RepresentationFeatures.load),
    "VAE": (lambda folder: KlAutoencoder(KlConfig(32, 4, (32,), 1)).save(folder), load_autoencoder),
    "diffusers": (diffusers, lambda folder: import_diffusers(str(folder), 32).report),
    "Qwen": (qwen, lambda folder: qwen_shape(folder / "config.json")),
    "generator": (mot, Generator.load),
    "class generator": (
        lambda folder: create_generator(DitConfig(5, 16, 1, 2), LATENTS, 0).save(folder),
        load_generator,
    ),
}


def mutated(tree: Any) -> Iterator[Any]:
    """The tree with each of its nodes replaced by each replacement, and without each of its keys."""
    if isinstance(tree, dict):
        for key in tree:
            yield {name: value for name, value in tree.items() if name != key}
            for child in (*REPLACEMENTS, *mutated(tree[key])):
                yield {**tree, key: child}
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            for child in mutated(value):
                yield [*tree[:index], child, *tree[index + 1 :]]
    yield from REPLACEMENTS


def refused_in_one_line(load: Callable[[Path], object], folder: Path, what: object) -> bool:
    try:
        load(folder)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1500, what
        return True
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return False


@pytest.mark.parametrize(("save", "load"), EXPORTS.values(), ids=EXPORTS)
def test_a_config_that_is_no_config_is_refused(
    save: Callable[[Path], object], load: Callable[[Path], object], tmp_path: Path
) -> None:
    save(tmp_path)
    assert not refused_in_one_line(load, tmp_path, "as it was written")
    for content in (
        b"{" * 9,
        b'{"a": ' * 100_000,
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b"3",
        b"null",
        b'"x"',
        b"{}",
    ):
        (tmp_path / "config.json").write_bytes(content)
        refused = refused_in_one_line(load, tmp_path, content[:20])
        assert refused or (
            content == b"{}" and save is diffusers
        )  # there what is absent has diffusers' default


@pytest.mark.slow
@pytest.mark.parametrize(("save", "load"), EXPORTS.values(), ids=EXPORTS)
def test_any_leaf_may_be_anything(
    save: Callable[[Path], object], load: Callable[[Path], object], tmp_path: Path
) -> None:
    save(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    refused = 0
    for changed in mutated(tree):
        path.write_text(json.dumps(changed))
        refused += refused_in_one_line(load, tmp_path, changed)
    assert refused > 50


@pytest.mark.parametrize("std", [0.0, -1.0, 1e-60, 1e60, math.inf, math.nan])
def test_deviations_that_cannot_be_divided_by_are_refused(std: float, tmp_path: Path) -> None:
    """As 32-bit numbers, as which they are used: there 1e-60 is 0 and 1e60 infinite."""
    mot(tmp_path)
    path = tmp_path / "config.json"
    tree = json.loads(path.read_text())
    tree["latents"]["std"][1] = std
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=r"std|latents|finite"):
        Generator.load(tmp_path)
    rpiae(tmp_path)
    tree = json.loads(path.read_text())
    tree["autoencoder"]["representation"]["std"][1] = std
    path.write_text(json.dumps(tree))
    if std != 1e60:
        with pytest.raises(ConfigError, match=r"std|finite"):
            load_autoencoder(tmp_path)


def test_half_a_character_in_a_prompt_is_one_line(tmp_path: Path) -> None:
    train_text_tokenizer(
        ["a red apple on blue", "two dogs beside a small green house"], tmp_path / "text", 400
    )
    with pytest.raises(UserError, match=r"'a \\ud83d dog': half a character at position 2") as error:
        load_text_tokenizer(str(tmp_path / "text")).encode("a \ud83d dog")
    str(error.value).encode()


def test_a_sampling_file_that_is_none_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generator.pretrained.Pipeline.load", lambda *_, **__: None)
    for content in (b"[" * 100_000, b"\xff", b"[]", b"3"):
        (tmp_path / "sampling.json").write_bytes(content)
        with pytest.raises(UserError, match=r"sampling\.json: "):
            load_pretrained(tmp_path)


@pytest.mark.parametrize("images", [0, -1, 10**12])
def test_a_pack_of_no_or_endless_images_is_one_line(images: int) -> None:
    """A dry run made lists of so many before it looked at the memory."""
    with pytest.raises(ConfigError, match="images_per_pack"):
        PixelConfig(images_per_pack=images, image_px=64)
