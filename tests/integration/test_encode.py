"""Pixel shards -> latent shards: content, views, statistics, several ranks, resuming, refusals."""

from __future__ import annotations

import dataclasses
import io
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.config import UserError
from data.plan.plan import sample_uniforms
from data.samples.images import fit_image
from data.samples.text import load_text_tokenizer, train_text_tokenizer
from data.shards import Sample, ShardDataset, ShardWriter, verify, write_manifest, write_shard
from tokenizer.config import (
    AutoencoderConfig,
    BridgeConfig,
    EncodeConfig,
    PixelDecoderConfig,
    RepresentationConfig,
)
from tokenizer.encode import encode_shards
from tokenizer.export import fingerprint
from tokenizer.rpiae import Autoencoder

CAPTIONS = ["a red apple on blue", "two dogs beside a small green house", "a cat"]
TOKENS_PER_IMAGE = 16


def png(seed: int, height: int = 32, width: int = 32) -> bytes:
    pixels = np.random.Generator(np.random.Philox(seed)).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def t2i_sample(number: int) -> Sample:
    meta = {"captions": [CAPTIONS[number % 3], CAPTIONS[2]], "number": number}
    return Sample(f"image-{number:03d}", {"png": png(number), "json": json.dumps(meta).encode()})


def edit_sample(number: int) -> Sample:
    parts = {"source.png": png(number), "target.png": png(100 + number)}
    return Sample(f"edit-{number:03d}", {**parts, "json": json.dumps({"instruction": CAPTIONS[1]}).encode()})


def wide_sample(number: int) -> Sample:
    """An image of a class, larger than the model's."""
    meta = {"label": number % 3, "class": f"n0{number % 3}"}
    return Sample(f"wide-{number:03d}", {"png": png(number, 40, 56), "json": json.dumps(meta).encode()})


def write_shards(directory: Path, samples: list[Sample]) -> None:
    with ShardWriter(directory, max_samples_per_shard=5, source="test") as writer:
        for sample in samples:
            writer.write(sample)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    write_shards(root / "t2i", [t2i_sample(number) for number in range(12)])
    write_shards(root / "edit", [edit_sample(number) for number in range(6)])
    write_shards(root / "wide", [wide_sample(number) for number in range(12)])
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
        Autoencoder(dataclasses.replace(config, bridge=None)).save(root / "rae")
    return root


def config_for(inputs: Path, out: Path, shards: str = "t2i") -> EncodeConfig:
    return EncodeConfig(
        autoencoder=str(inputs / "autoencoder"),
        shards=str(inputs / shards),
        out=str(out),
        text_tokenizer=str(inputs / "text"),
        batch_images=3,
    )


def wide_config(inputs: Path, out: Path) -> EncodeConfig:
    """Two crops and their mirror images, with log variances, of images without captions."""
    return dataclasses.replace(
        config_for(inputs, out, shards="wide"),
        text_tokenizer=None,
        resize_px=36,
        num_crops=2,
        horizontal_flip=True,
        seed=5,
        logvar=True,
        batch_images=9,  # two samples of four views, and one view's room that stays free
        dtype="fp32",
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


@pytest.fixture(scope="module")
def encoded_wide(inputs: Path) -> Path:
    encode(wide_config(inputs, inputs / "wide-latents"))
    return inputs / "wide-latents"


def stored_values(dataset: ShardDataset, part: str = "latent") -> torch.Tensor:
    """[samples, C, Y, X], or with views or log variances [samples, V, M, C, Y, X]."""
    latent = dataset.manifest.latent
    assert latent is not None
    shape = (latent.num_views, 2 if latent.has_logvar else 1, *latent.shape)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[latent.dtype]
    raw = [bytearray(sample.parts[part]) for sample in dataset.read(range(len(dataset)))]
    values = torch.stack([torch.frombuffer(item, dtype=dtype).view(shape) for item in raw])
    return values[:, 0, 0] if shape[:2] == (1, 1) else values


def pixels_of(
    payload: bytes, number: int, key: str, config: EncodeConfig, model: Autoencoder
) -> torch.Tensor:
    """Crop `number` of an image, cut out by the plain functions: [3, H, W] in [0, 1]."""
    corner = sample_uniforms(config.seed, number, key)[:2] if number else None
    image_px = model.config.image_px
    return (
        fit_image(Image.open(io.BytesIO(payload)), image_px, resize_px=config.resize_px, corner=corner) / 255
    )


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
    assert latent.tokenizer_fingerprint == fingerprint(inputs / "autoencoder")
    assert latent.text_tokenizer_fingerprint == load_text_tokenizer(str(inputs / "text")).fingerprint


@pytest.mark.parametrize("world", [2, 3, 4])
def test_bytes_do_not_depend_on_the_number_of_ranks(
    inputs: Path, encoded: Path, tmp_path: Path, world: int
) -> None:
    encode(config_for(inputs, tmp_path), world)
    assert content(tmp_path) == content(encoded)


@pytest.mark.parametrize(("world", "num_decode_threads"), [(1, 1), (2, 4), (3, 7)])
def test_bytes_of_views_depend_neither_on_ranks_side_by_side_nor_on_threads(
    inputs: Path, encoded_wide: Path, tmp_path: Path, world: int, num_decode_threads: int
) -> None:
    config = dataclasses.replace(wide_config(inputs, tmp_path), num_decode_threads=num_decode_threads)
    barrier = threading.Barrier(world)
    with ThreadPoolExecutor(world) as ranks:

        def wait() -> None:
            barrier.wait(timeout=60)

        running = [
            ranks.submit(encode_shards, config, rank=rank, world=world, barrier=wait) for rank in range(world)
        ]
        for rank in running:
            rank.result()
    assert content(tmp_path) == content(encoded_wide)


def test_views_are_the_centre_and_random_crops_each_followed_by_its_mirror_image(
    inputs: Path, encoded_wide: Path
) -> None:
    config, model = wide_config(inputs, encoded_wide), Autoencoder.load(inputs / "autoencoder")
    dataset = ShardDataset.open(encoded_wide)
    latent = dataset.manifest.latent
    assert latent is not None and (latent.num_views, latent.has_logvar) == (4, True)
    assert verify(encoded_wide) == []
    assert dataset.num_image_tokens.tolist() == [TOKENS_PER_IMAGE] * 12, (
        "tokens of one view: one is trained on"
    )
    values = stored_values(dataset)
    for index, before in enumerate(ShardDataset.open(inputs / "wide").read(range(12))):
        crops = [pixels_of(before.parts["png"], number, before.key, config, model) for number in range(2)]
        views = torch.stack([view for crop in crops for view in (crop, crop.flip(-1))])
        assert not torch.equal(crops[0], crops[1]) and not torch.equal(views[0], views[1])
        with torch.no_grad():
            expected = torch.stack(model.encode_moments(views), dim=1)
        # fp32, in batches of other sizes: roundings of 1e-7 in values of order 1.
        torch.testing.assert_close(values[index], expected, rtol=1e-5, atol=1e-5)


def test_statistics_are_of_the_means_over_all_views(encoded_wide: Path) -> None:
    dataset = ShardDataset.open(encoded_wide)
    assert dataset.manifest.latent is not None
    means = stored_values(dataset)[:, :, 0].double()
    # Both in fp64, merged in another order: a few roundings of 1e-16.
    assert dataset.manifest.latent.mean == pytest.approx(means.mean(dim=(0, 1, 3, 4)).tolist(), rel=1e-10)
    std = means.std(dim=(0, 1, 3, 4), unbiased=False).tolist()
    assert dataset.manifest.latent.std == pytest.approx(std, rel=1e-10)


def test_source_and_target_of_an_edit_share_crop_and_flip(inputs: Path, tmp_path: Path) -> None:
    same = png(7, 40, 56)
    sample = Sample("edit", {"source.png": same, "target.png": same, "json": b'{"instructions": ["a cat"]}'})
    write_shards(tmp_path / "pixels", [sample])
    config = dataclasses.replace(
        wide_config(inputs, tmp_path / "out"),
        shards=str(tmp_path / "pixels"),
        text_tokenizer=str(inputs / "text"),
        batch_images=8,
    )
    encode(config)
    dataset = ShardDataset.open(tmp_path / "out")
    source, target = stored_values(dataset, "source.latent"), stored_values(dataset, "target.latent")
    # One forward pass, but a row may round differently than another.
    torch.testing.assert_close(source, target, rtol=1e-5, atol=1e-5)
    assert (source[0, 0] - source[0, 2]).abs().max() > 1e-3, "the crops differ"
    assert dataset.num_image_tokens.tolist() == [2 * TOKENS_PER_IMAGE]


def test_classes_have_no_text_and_need_no_text_tokenizer(encoded_wide: Path) -> None:
    dataset = ShardDataset.open(encoded_wide)
    assert dataset.num_text_tokens.tolist() == [0] * 12
    assert dataset.manifest.latent is not None
    assert dataset.manifest.latent.text_tokenizer_fingerprint == ""
    assert json.loads(dataset.read([4])[0].parts["json"]) == {"label": 1, "class": "n01"}


def test_a_caption_without_a_text_tokenizer_is_refused(inputs: Path, tmp_path: Path) -> None:
    config = dataclasses.replace(config_for(inputs, tmp_path), text_tokenizer=None)
    with pytest.raises(UserError, match="'image-000': has a caption; give text_tokenizer"):
        encode(config)


def test_the_longest_of_several_kinds_of_caption_is_counted(inputs: Path, tmp_path: Path) -> None:
    captions = {"short": CAPTIONS[2], "long": CAPTIONS[1], "tags": CAPTIONS[0]}
    sample = Sample("kinds", {"png": png(0), "json": json.dumps({"captions": captions}).encode()})
    write_shards(tmp_path / "pixels", [sample, t2i_sample(1)])
    encode(dataclasses.replace(config_for(inputs, tmp_path / "out"), shards=str(tmp_path / "pixels")))
    tokenizer = load_text_tokenizer(str(inputs / "text"))
    assert ShardDataset.open(tmp_path / "out").num_text_tokens[0] == len(tokenizer.encode(CAPTIONS[1]))


def test_shards_whose_inputs_were_all_rejected_leave_a_gap(
    inputs: Path, encoded: Path, tmp_path: Path
) -> None:
    samples = ShardDataset.open(inputs / "t2i").read(range(12))
    shards = {0: samples[:5], 1: [], 3: samples[5:]}
    for number, of_shard in shards.items():
        write_shard(
            tmp_path / f"pixels/shard-{number:06d}.tar",
            of_shard,
            [(0, 0)] * len(of_shard),
            source="test",
            rejected=() if of_shard else (("bad", "unreadable: cut short"),),
        )
    names = [f"shard-{number:06d}.tar" for number in shards]
    write_manifest(tmp_path / "pixels", names, source="test")
    config = dataclasses.replace(config_for(inputs, tmp_path / "out"), shards=str(tmp_path / "pixels"))
    encode(config, world=2)
    dataset = ShardDataset.open(tmp_path / "out")
    assert [entry.name for entry in dataset.manifest.shards] == [names[0], names[2]]
    assert [sample.key for sample in dataset.read(range(12))] == [sample.key for sample in samples]
    # Batches of three are cut at other places: another rounding of bf16 (8 bits) here and there.
    torch.testing.assert_close(
        stored_values(dataset).float(),
        stored_values(ShardDataset.open(encoded)).float(),
        rtol=2**-7,
        atol=1e-4,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"autoencoder": "rae"}, "rae: has no log variance"),
        ({"resize_px": 31}, "resize_px = 31 is smaller than the autoencoder's image_px = 32"),
    ],
)
def test_options_that_do_not_fit_the_autoencoder_are_refused(
    inputs: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    if "autoencoder" in change:
        change = {"autoencoder": str(inputs / "rae")}
    with pytest.raises(UserError, match=message):
        encode(dataclasses.replace(wide_config(inputs, tmp_path), **change))  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"resize_px": 40},
        {"num_crops": 3},
        {"horizontal_flip": False},
        {"seed": 6},
        {"logvar": False},
        {"dtype": "bf16"},
    ],
)
def test_shards_of_other_views_are_not_mixed_in(
    inputs: Path, encoded_wide: Path, change: dict[str, object]
) -> None:
    before = content(encoded_wide)
    with pytest.raises(UserError, match="use an empty directory"):
        encode(dataclasses.replace(wide_config(inputs, encoded_wide), **change))  # type: ignore[arg-type]
    assert content(encoded_wide) == before


@pytest.mark.parametrize(
    ("bias", "dtype", "message"),
    [
        (1e5, "fp16", "too large for fp16"),
        (float("nan"), "bf16", "not finite; check the autoencoder"),
        (float("nan"), "fp16", "not finite; check the autoencoder"),
    ],
)
def test_values_that_cannot_be_stored_name_the_sample(
    inputs: Path, tmp_path: Path, bias: float, dtype: str, message: str
) -> None:
    model = Autoencoder.load(inputs / "autoencoder")
    assert model.bridge is not None
    with torch.no_grad():
        model.bridge.encoder.to_moments.bias[0] = bias
    model.save(tmp_path / "spoilt")
    config = dataclasses.replace(config_for(inputs, tmp_path / "out"), autoencoder=str(tmp_path / "spoilt"))
    with pytest.raises(UserError, match=f"'image-000': the latent of 'png' is {message}"):
        encode(dataclasses.replace(config, dtype=dtype))  # type: ignore[arg-type]
    assert not list((tmp_path / "out").rglob("*.tar*"))


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
