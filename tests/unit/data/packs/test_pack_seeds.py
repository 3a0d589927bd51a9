"""Every packer seeds a pack's noise and timesteps by the run's seed, the step and the stream, and by nothing else."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from PIL import Image

from data.config import ClassPackingConfig, PackingConfig, PixelConfig
from data.packs.class_batch import ClassPacker
from data.packs.packing import EditPacker, T2IPacker
from data.plan.plan import pack_seed
from data.samples.images import PixelPacker
from data.shards import LatentInfo, Sample

SHAPE = (3, 2, 2)
LATENT = LatentInfo("fp32", SHAPE, (0.0,) * 3, (1.0,) * 3, "autoencoder", "letters")


class Letters:
    im_start_id, im_end_id, vision_start_id, vision_end_id = 256, 257, 258, 259
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def sample(key: str, fields: dict[str, object], *parts: str) -> Sample:
    latent = torch.ones(SHAPE).numpy().tobytes()
    return Sample(key, {**dict.fromkeys(parts, latent), "json": json.dumps(fields).encode()})


def picture() -> Sample:
    content = io.BytesIO()
    Image.new("RGB", (8, 8)).save(content, "PNG")
    return Sample("p", {"png": content.getvalue(), "json": b"{}"})


text: Any = Letters()
PACKERS: dict[str, Callable[[], tuple[Any, Sequence[Sample]]]] = {
    "t2i": lambda: (
        T2IPacker(PackingConfig(100, max_side=4), LATENT, text),
        [sample("t", {"caption": "a"}, "latent")],
    ),
    "edit": lambda: (
        EditPacker(PackingConfig(100, max_side=4), LATENT, text),
        [sample("e", {"instruction": "a"}, "source.latent", "target.latent")],
    ),
    "class": lambda: (ClassPacker(ClassPackingConfig(4), LATENT, 5), [sample("c", {"label": 2}, "latent")]),
    "pixels": lambda: (PixelPacker(PixelConfig(image_px=8, images_per_pack=4)), [picture()]),
}


@pytest.mark.parametrize("kind", PACKERS)
def test_a_pack_s_seed_is_of_its_run_its_step_and_its_stream(kind: str) -> None:
    packer, samples = PACKERS[kind]()
    found = {
        (seed, step, stream): packer.collate(
            samples, step=step, stream=stream, epochs=[epoch], seed=seed
        ).seed
        for seed in (0, 7)
        for step in (0, 3)
        for stream in (0, 5)
        for epoch in (1, 2)
    }
    assert found == {names: pack_seed(*names) for names in found}
    assert len(set(found.values())) == len(found) == 8
