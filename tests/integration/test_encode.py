"""Pixel shards -> latent shards: content, statistics, several ranks, resuming, refusals."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.shards import Sample, ShardDataset, ShardWriter, verify
from data.text import load_text_tokenizer, train_text_tokenizer
from engine.config import UserError
from tokenizer import rpiae
from tokenizer.bridge import BridgeConfig
from tokenizer.encode import EncodeConfig, encode_shards
from tokenizer.pixel_decoder import PixelDecoderConfig
from tokenizer.representation import RepresentationConfig
from tokenizer.rpiae import Autoencoder, AutoencoderConfig

CAPTIONS = ["a red apple on blue", "two dogs beside a small green house", "a cat"]
TOKENS_PER_IMAGE = 16


def png(seed: int) -> bytes:
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def t2i_sample(number: int) -> Sample:
    meta = {"captions": [CAPTIONS[number % 3], CAPTIONS[2]], "number": number}
    return Sample(f"image-{number:03d}", {"png": png(number), "json": json.dumps(meta).encode()})


def edit_sample(number: int) -> Sample:
    parts = {"source.png": png(number), "target.png": png(100 + number)}
    return Sample(f"edit-{number:03d}", {**parts, "json": json.dumps({"instruction": CAPTIONS[1]}).encode()})


def write_shards(directory: Path, samples: list[Sample]) -> None:
    with ShardWriter(directory, max_samples_per_shard=5, source="test") as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    write_shards(root / "t2i", [t2i_sample(number) for number in range(12)])
    write_shards(root / "edit", [edit_sample(number) for number in range(6)])
    train_text_tokenizer(CAPTIONS, root / "text", 400)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        representation = RepresentationConfig(
            name="vit_tiny_patch16_224",
            input_px=32,
            weights="random",
            overrides={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
        )
        config = AutoencoderConfig(
            representation=representation,
            decoder=PixelDecoderConfig(width=32, layers=1, heads=4, mlp_width=64, patch_px=8),
            image_px=32,
            bridge=BridgeConfig(latent_channels=6, decoder_layers=1, num_heads=4),
        )
        Autoencoder(config).save(root / "autoencoder")
        Autoencoder(config).save(root / "another")
    return root


def config_for(inputs: Path, out: Path, shards: str = "t2i") -> EncodeConfig:
    return EncodeConfig(
        autoencoder=str(inputs / "autoencoder"),
        shards=str(inputs / shards),
        out=str(out),
        text_tokenizer=str(inputs / "text"),
        batch_images=3,
    )


def encode(config: EncodeConfig, world: int = 1) -> None:
    """The ranks one after the other, rank 0 last: it alone writes after the barrier."""
    for rank in reversed(range(world)):
        encode_shards(config, rank=rank, world=world, barrier=lambda: None)


def content(directory: Path) -> dict[str, bytes]:
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def encoded(inputs: Path) -> Path:
    encode(config_for(inputs, inputs / "latents"))
    return inputs / "latents"


def stored_values(dataset: ShardDataset, part: str = "latent") -> torch.Tensor:
    raw = [bytearray(sample.parts[part]) for sample in dataset.read(range(len(dataset)))]
    return torch.stack([torch.frombuffer(item, dtype=torch.bfloat16).view(6, 4, 4) for item in raw])


def test_every_sample_becomes_its_latent_with_the_same_key_and_json(inputs: Path, encoded: Path) -> None:
    pixels, latents = ShardDataset.open(inputs / "t2i"), ShardDataset.open(encoded)
    assert verify(encoded) == []
    assert [entry.name for entry in latents.manifest.shards] == [
        entry.name for entry in pixels.manifest.shards
    ]
    before, after = pixels.read(range(12)), latents.read(range(12))
    assert [sample.key for sample in before] == [sample.key for sample in after]
    assert [sample.parts["json"] for sample in before] == [sample.parts["json"] for sample in after]
    assert all(set(sample.parts) == {"latent", "json"} for sample in after)
    images = [np.asarray(Image.open(io.BytesIO(sample.parts["png"]))) for sample in before]
    model = Autoencoder.load(inputs / "autoencoder")
    with torch.no_grad():
        expected = model.encode(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255)
    # bf16 keeps 8 bits of the mantissa.
    torch.testing.assert_close(stored_values(latents).float(), expected, rtol=2**-8, atol=1e-4)


def test_token_counts_are_those_that_packing_needs(inputs: Path, encoded: Path) -> None:
    dataset = ShardDataset.open(encoded)
    assert dataset.num_image_tokens.tolist() == [TOKENS_PER_IMAGE] * 12
    tokenizer = load_text_tokenizer(str(inputs / "text"))
    longest = [
        max(len(tokenizer.encode(CAPTIONS[i % 3])), len(tokenizer.encode(CAPTIONS[2]))) for i in range(12)
    ]
    assert dataset.num_text_tokens.tolist() == longest


def test_statistics_are_those_of_the_stored_values(inputs: Path, encoded: Path) -> None:
    latent = ShardDataset.open(encoded).manifest.latent
    assert latent is not None
    values = stored_values(ShardDataset.open(encoded)).double()
    # Both in fp64, merged in another order: a few roundings of 1e-16.
    assert latent.mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), rel=1e-10, abs=1e-12)
    assert latent.std == pytest.approx(values.std(dim=(0, 2, 3), unbiased=False).tolist(), rel=1e-10)
    assert latent.shape == (6, 4, 4)
    assert latent.tokenizer_fingerprint == rpiae.fingerprint(inputs / "autoencoder")
    assert latent.text_tokenizer_fingerprint == load_text_tokenizer(str(inputs / "text")).fingerprint


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_do_not_depend_on_the_number_of_ranks(
    inputs: Path, encoded: Path, tmp_path: Path, world: int
) -> None:
    encode(config_for(inputs, tmp_path), world)
    assert content(tmp_path) == content(encoded)


def test_an_interrupted_run_continues_to_the_same_bytes(inputs: Path, encoded: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path)
    encode_shards(config, rank=1, world=3, barrier=lambda: None)  # one shard of three, no manifest
    assert not (tmp_path / "manifest.json").exists()
    finished = tmp_path / "shard-000001.tar"
    written_at = finished.stat().st_mtime_ns
    (tmp_path / "shard-000000.tar").write_bytes(b"cut short")
    encode(config)
    assert content(tmp_path) == content(encoded)
    assert finished.stat().st_mtime_ns == written_at


def test_edits_keep_source_and_target_apart(inputs: Path, tmp_path: Path) -> None:
    encode(config_for(inputs, tmp_path, shards="edit"))
    dataset = ShardDataset.open(tmp_path)
    assert dataset.num_image_tokens.tolist() == [2 * TOKENS_PER_IMAGE] * 6
    source, target = stored_values(dataset, "source.latent"), stored_values(dataset, "target.latent")
    model = Autoencoder.load(inputs / "autoencoder")
    for seed, stored in ((4, source[4]), (104, target[4])):
        image = torch.from_numpy(np.array(Image.open(io.BytesIO(png(seed))))).permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = model.encode(image.float() / 255)[0]
        torch.testing.assert_close(stored.float(), expected, rtol=2**-8, atol=1e-4)  # bf16


def test_shards_of_another_tokenizer_are_not_mixed_in(inputs: Path, tmp_path: Path) -> None:
    config = config_for(inputs, tmp_path)
    encode(config)
    before = content(tmp_path)
    with pytest.raises(UserError) as caught:
        encode(dataclasses.replace(config, autoencoder=str(inputs / "another")))
    assert "\n" not in str(caught.value)
    assert content(tmp_path) == before


def test_latents_are_not_encoded_again(inputs: Path, encoded: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(inputs, tmp_path), shards=str(encoded))
    with pytest.raises(UserError, match="holds latents already"):
        encode(config)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"png": png(0), "json": b"{}"}, "no json with one of caption"),
        ({"png": png(0)}, "no json with one of caption"),
        ({"png": png(0), "json": b'{"caption": " "}'}, "empty caption"),
        ({"json": b'{"caption": "a cat"}'}, "no image part"),
        ({"png": png(0)[:200], "json": b'{"caption": "a cat"}'}, "no readable image"),
    ],
)
def test_a_bad_sample_is_named_and_nothing_is_half_written(
    inputs: Path, tmp_path: Path, parts: dict[str, bytes], message: str
) -> None:
    write_shards(tmp_path / "bad", [Sample("broken", parts)])
    config = dataclasses.replace(config_for(inputs, tmp_path / "out"), shards=str(tmp_path / "bad"))
    with pytest.raises(UserError, match=f"'broken'.*{message}"):
        encode(config)
    assert not list((tmp_path / "out").glob("shard-*"))
