"""An encoder that is killed at random moments leaves, in the end, the bytes of an undisturbed one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.samples.text import train_text_tokenizer
from data.shards import Sample, ShardWriter
from tokenizer.config import EncodeConfig
from tokenizer.encode import encode_shards
from tokenizer.rpiae import Autoencoder

NUM_SHARDS = 16


@pytest.fixture(scope="module")
def inputs(tiny_autoencoder: Callable[..., Autoencoder], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide images with captions, a text tokenizer and a tiny autoencoder."""
    root = tmp_path_factory.mktemp("encode-kill")
    with ShardWriter(root / "pixels", max_samples_per_shard=6, source="test") as writer:
        for number in range(6 * NUM_SHARDS):
            pixels = np.random.Generator(np.random.Philox(number)).integers(0, 256, (40, 56, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            meta = json.dumps({"caption": f"picture {number}"}).encode()
            writer.write(Sample(f"image-{number}", {"png": file.getvalue(), "json": meta}))
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], root / "text", 400)
    tiny_autoencoder(root / "autoencoder")
    return root


@pytest.mark.slow
def test_twenty_kills_leave_the_bytes_of_an_undisturbed_encoder(inputs, assert_kills_change_nothing) -> None:  # type: ignore[no-untyped-def]
    def write(out: Path) -> None:
        config = EncodeConfig(
            autoencoder=str(inputs / "autoencoder"),
            shards=str(inputs / "pixels"),
            out=str(out),
            text_tokenizer=str(inputs / "text"),
            resize_px=36,
            num_crops=2,
            horizontal_flip=True,
            logvar=True,
            batch_images=4,
        )
        encode_shards(config, rank=0, world=1, barrier=lambda: None)

    assert_kills_change_nothing(write)
