"""Image files become pixels exactly, and a bad file is named."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from base.config import ConfigError, UserError
from data.config import PixelConfig
from data.plan.mixture import Mixture
from data.plan.stream import PackStream
from data.samples.images import PixelPacker, decode_image, fit_image, part_name
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter


def encoded(pixels: np.ndarray, kind: str = "png") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def collate(samples: list[Sample], config: PixelConfig, epoch: int = 0):  # type: ignore[no-untyped-def]
    return PixelPacker(config).collate(samples, step=0, stream=0, epochs=[epoch] * len(samples), seed=0)


def test_image_of_the_right_size_is_kept_bit_for_bit() -> None:
    pixels = noise(8, 8)
    sample = Sample("a", {"png": encoded(pixels), "json": json.dumps({"caption": "x"}).encode()})
    batch = collate([sample, Sample("b", {"png": encoded(pixels)})], PixelConfig(2, image_px=8))
    assert batch.pixels.dtype == torch.uint8
    assert torch.equal(batch.pixels[0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert batch.pixels_01.dtype == torch.float32
    assert torch.equal(batch.pixels_01 * 255, batch.pixels.float())
    assert batch.sample_ids == ("a", "b")
    assert batch.meta == ({"caption": "x"}, {})


@pytest.mark.parametrize("size", [(8, 21), (21, 8), (9, 8), (64, 40), (3, 5), (1, 30)])
def test_every_shape_becomes_the_square(size: tuple[int, int]) -> None:
    image = Image.fromarray(noise(*size))
    assert fit_image(image, 8).shape == (3, 8, 8)
    assert fit_image(image, 8, resize_px=12, corner=(0.999, 0.0)).shape == (3, 8, 8)


def test_crop_is_in_the_centre() -> None:
    """As ADM: an odd remainder leaves the extra column on the right."""
    pixels = noise(8, 13)
    assert torch.equal(
        fit_image(Image.fromarray(pixels), 8), torch.from_numpy(pixels[:, 2:10]).permute(2, 0, 1)
    )


def test_large_photographs_are_averaged_before_the_bicubic_step() -> None:
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None].repeat(3, 2)
    assert set(fit_image(Image.fromarray(checker), 8).unique().tolist()) <= {127, 128}


def test_transparency_is_laid_on_white() -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2, :, 3] = 255
    image = np.array(decode_image(Sample("a", {"png": encoded(pixels)}), "png"))
    assert (image[:2] == 0).all()
    assert (image[2:] == 255).all()


def test_random_crop_is_keyed_by_sample_and_epoch() -> None:
    config = PixelConfig(1, image_px=8, resize_px=16, crop="random")
    pixels = encoded(noise(16, 16))

    def crop(key: str, epoch: int) -> bytes:
        return collate([Sample(key, {"png": pixels})], config, epoch).pixels.numpy().tobytes()

    assert crop("a", 0) == crop("a", 0)
    assert len({crop("a", epoch) for epoch in range(20)}) > 10
    assert len({crop(f"k{number}", 0) for number in range(20)}) > 10


@pytest.mark.parametrize("payload", [b"not an image", encoded(noise(32, 32))[:200], b""])
def test_corrupt_image_is_named_with_shard_and_key(payload: bytes) -> None:
    sample = Sample("cat", {"png": payload}, shard="set/shard-000003.tar")
    with pytest.raises(
        UserError, match=r"set/shard-000003.tar: sample 'cat': 'png' is no readable image"
    ) as error:
        collate([sample], PixelConfig(1, image_px=8))
    assert "\n" not in str(error.value)


def test_corrupt_payload_inside_a_valid_png_is_named() -> None:
    payload = bytearray(encoded(noise(32, 32)))
    payload[100:200] = bytes(100)
    with pytest.raises(UserError, match="sample 'cat': 'png' is no readable image"):
        collate([Sample("cat", {"png": bytes(payload)})], PixelConfig(1, image_px=8))


@pytest.mark.parametrize("parts", [{"json": b"{}"}, {"png": b"x", "jpg": b"x"}, {"source.png": b"x"}])
def test_sample_without_exactly_one_image_is_refused(parts: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match=r"sample 'a': . of png, jpg, jpeg, webp"):
        collate([Sample("a", parts)], PixelConfig(1, image_px=8))


def test_long_thin_image_is_named_before_it_takes_all_memory() -> None:
    """60000x2 px at 256 px would be 7.9 GB; at the limit every image still becomes the square."""
    thin = Sample("thin", {"png": encoded(np.zeros((2, 60_000, 3), np.uint8))})
    with pytest.raises(UserError, match=r"sample 'thin': 'png': 60000x2 px would be enlarged to 7680000x256"):
        collate([thin], PixelConfig(1, image_px=256))
    assert collate([thin], PixelConfig(1, image_px=16)).pixels.shape == (1, 3, 16, 16)


@pytest.mark.parametrize("payload", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_bad_json_beside_an_image_is_named(payload: bytes) -> None:
    sample = Sample("cat", {"png": encoded(noise(8, 8)), "json": payload}, shard="set/shard-000003.tar")
    with pytest.raises(UserError, match=r"set/shard-000003.tar: sample 'cat': bad json") as error:
        collate([sample], PixelConfig(1, image_px=8))
    assert "\n" not in str(error.value)


def test_image_parts_are_named_by_role_and_suffix() -> None:
    assert [part_name("", "jpg"), part_name("source", "png")] == ["jpg", "source.png"]


def test_shards_of_latents_are_refused(tmp_path: Path) -> None:
    latent = LatentInfo("fp32", (1, 1, 1), (0.0,), (1.0,), "autoencoder", "text")
    with ShardWriter(tmp_path, max_samples_per_shard=4, source="t", latent=latent) as writer:
        writer.write(Sample("a", {"latent": bytes(4)}))
    with pytest.raises(UserError, match="holds latents, not pixels"):
        PixelPacker(PixelConfig(1, image_px=8)).lengths(ShardDataset.open(tmp_path))


def test_config_refuses_a_crop_larger_than_the_image() -> None:
    with pytest.raises(ConfigError, match="resize_px = 4 is smaller than image_px = 8"):
        PixelConfig(1, image_px=8, resize_px=4)


def test_pixel_packs_through_the_stream_are_full(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_samples_per_shard=8, source="t") as writer:
        for number in range(20):
            writer.write(Sample(f"k{number}", {"png": encoded(noise(8, 8, seed=number))}))
    dataset, packer = ShardDataset.open(tmp_path), PixelPacker(PixelConfig(4, image_px=8))
    stream = PackStream(Mixture.of(dataset), packer, num_streams=2, seed=0, rank=0, world=1, prefetch_steps=1)
    seen = [batch.sample_ids for _ in range(5) for batch in stream.next_step()]
    stream.close()
    assert {len(keys) for keys in seen} == {4}
    assert len({key for keys in seen[:4] for key in keys}) == 16  # within an epoch nothing comes twice
