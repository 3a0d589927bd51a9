"""What a sample is made of: roles and splits are read or refused, and carry through from files to packs."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from base.config import UserError
from data.config import PackingConfig
from data.doctor.examine_set import diagnose
from data.packs.packing import EditPacker
from data.samples.captions import read_captions
from data.samples.images import image_parts
from data.samples.latents import read_latents
from data.samples.layouts import (
    ImagePart,
    TextPart,
    check_roles,
    image_roles,
    packed_lengths,
    read_layout,
    read_splits,
)
from data.shards import LatentInfo, Sample, ShardDataset, ShardWriter
from data.sources.base import InUnits
from data.sources.image_folder import FolderSource
from data.sources.prepare import Preparation
from data.sources.webdataset import WebDatasetSource
from data.sources.write import write_sources
from helpers.texts import Bytes
from tokenizer.latent_sample import latent_sample
from tokenizer.views import Views, read_crops

PX = 4
LATENT = LatentInfo("fp32", (3, PX, PX), (0.0,) * 3, (1.0,) * 3, "pixels", "letters")


# Roles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "roles",
    [
        [""],
        ["source", "target"],
        ["source0", "source1", "target"],
        ["source", "target0", "target1"],
        ["source0", "target0"],
        ["source0", "source1", "source2", "target0", "target1", "target2", "target3"],
        ["image0"],
        [f"image{number}" for number in range(7)],
    ],
)
def test_roles_of_a_layout_are_taken(roles: list[str]) -> None:
    check_roles(roles)


@pytest.mark.parametrize(
    ("roles", "message"),
    [
        ([], "expected one, or source and target; found none"),
        (["", ""], "found one without a role, one without a role"),
        (["source"], "expected one, or source and target; found source"),
        (["target"], "found target"),
        (["", "source", "target"], "found one without a role, source, target"),
        (["source", "source0", "target"], "found source, source0, target"),
        (["source1", "source2", "target"], "found source1, source2, target"),
        (["source", "target", "target"], "found source, target, target"),
        (["image1"], "expected image0, image1, ... without a gap and nothing else; found image1"),
        (["image0", "image0"], "found image0, image0"),
        (["image0", "target"], "found image0, target"),
        (["", "image0"], "found one without a role, image0"),
        ([f"image{number}" for number in range(8)], "8 images, a sample holds at most 7"),
    ],
)
def test_roles_of_no_layout_are_refused(roles: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_roles(roles)


def test_roles_are_those_of_latents_or_of_images() -> None:
    assert image_roles(["json", "source1.jpg", "source0.png", "target.webp", "cls"]) == [
        "source0",
        "source1",
        "target",
    ]
    assert image_roles(["json", "image0.latent", "image1.latent"]) == ["image0", "image1"]
    assert image_roles(["jpg", "latent"]) == [""], "an image beside its own latent is no second one"
    assert image_roles(["png", "mask.png", "target.txt"]) == [""], "names that are no roles are passed over"


# Splits ---------------------------------------------------------------------------------------------


def test_splits_are_texts_and_images_in_any_order() -> None:
    splits = [
        {"image": "image1"},
        {"text": "a", "loss": True},
        {"image": "image0", "target": True},
        {"image": "image0", "target": False},
        {"text": "b"},
    ]
    assert read_splits({"splits": splits}, ["image0", "image1"]) == [
        ImagePart("image1", target=False),
        TextPart("a", loss=True),
        ImagePart("image0", target=True),
        ImagePart("image0", target=False),
        TextPart("b"),
    ]


GOOD = [{"text": "a"}, {"image": "image0", "target": True}]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (None, 'json has no list "splits"'),
        ({"text": "a"}, 'json has no list "splits"'),
        (GOOD[1:], '"splits" has no text'),
        ([{"text": "a"}, {"image": "image0"}], '"splits" has no image with "target": true'),
        (GOOD[:1], '"splits" leaves out image0'),
        ([*GOOD, {"image": "image1"}], '"splits" entry 2 is neither .* one of image0,'),
        ([*GOOD, {"image": ["image0"]}], "entry 2 is neither"),
        ([*GOOD, {"text": " "}], "entry 2 is neither"),
        ([*GOOD, {"text": 3}], "entry 2 is neither"),
        ([*GOOD, "a"], "entry 2 is neither"),
        ([*GOOD, {"text": "a", "loss": 1}], "entry 2 is neither"),
        ([*GOOD, {"text": "a", "text_loss": True}], "entry 2 is neither"),
        ([*GOOD, {"image": "image0", "target": "yes"}], "entry 2 is neither"),
        ([*GOOD, {"image": "image0", "loss": True}], "entry 2 is neither"),
        ([*GOOD, {"text": "a", "image": "image0"}], "entry 2 is neither"),
    ],
)
def test_splits_that_cannot_be_trained_are_refused(splits: object, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read_splits({"splits": splits}, ["image0"])
    assert "\n" not in str(error.value)


def test_a_layout_names_its_sample_when_it_cannot_be_read() -> None:
    def sample(tree: object) -> Sample:
        return Sample("k", {"image0.png": b"x", "json": json.dumps(tree).encode()}, shard="shard-000000.tar")

    with pytest.raises(UserError, match=r"sample 'k': \"splits\" leaves out image0; make"):
        read_layout(sample({"splits": GOOD[:1]}))
    with pytest.raises(UserError, match=r"^shard-000000\.tar: sample 'k': bad json"):
        read_layout(sample([1]))


# From files to packs --------------------------------------------------------------------------------

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "grey": (64, 64, 64)}
LINES: list[dict[str, Any]] = [
    {"source": "red.png", "target": "green.png", "instruction": "one"},
    {"source": ["red.png", "grey.png"], "target": "blue.png", "instructions": ["two", "longer"]},
    {"source": ["grey.png"], "target": ["red.png", "green.png", "blue.png"], "instruction": "three"},
    {
        "splits": [
            {"text": " draw "},
            {"image": "blue.png", "target": True},
            {"image": "blue.png"},
            {"image": "red.png"},
            {"text": "mix", "loss": True},
            {"image": "grey.png", "target": True},
        ],
        "origin": "a test",
    },
]
# Of each line: role -> color, what the text tokenizer counts, targets.
EXPECTED = [
    ({"source": "red", "target": "green"}, len("one"), 1),
    ({"source0": "red", "source1": "grey", "target": "blue"}, len("longer"), 1),
    ({"source": "grey", "target0": "red", "target1": "green", "target2": "blue"}, len("three"), 3),
    ({"image0": "blue", "image1": "red", "image2": "grey"}, len("draw") + len("mix") + 2, 2),
]


@pytest.fixture
def pixels(tmp_path: Path) -> Path:
    """Pixel shards from a listing."""
    images = tmp_path / "images"
    images.mkdir()
    for name, color in COLORS.items():
        Image.new("RGB", (PX, PX), color).save(images / f"{name}.png")
    listing = tmp_path / "listing.jsonl"
    listing.write_text("\n".join(json.dumps(line) for line in LINES))
    source = InUnits(FolderSource(images, listing), 100)
    write_sources({tmp_path / "pixels": source}, prepare=Preparation())
    return tmp_path / "pixels"


@pytest.fixture
def latents(pixels: Path, tmp_path: Path) -> ShardDataset:
    """Latent shards whose latents are the pixels themselves, by the steps of launch/encode_latents.py."""
    dataset = ShardDataset.open(pixels)
    views = Views(PX, PX, num_crops=1, horizontal_flip=False, seed=0)
    with ShardWriter(tmp_path / "latents", max_samples_per_shard=100, source="test", latent=LATENT) as writer:
        for samples, crops in read_crops(dataset, [range(len(dataset))], views, num_threads=1):
            images = iter(crops[:, :, None].float())
            for sample in samples:
                writer.write(*latent_sample(sample, images, Bytes()))
    return ShardDataset.open(tmp_path / "latents")


def colors(dataset: ShardDataset, index: int, roles: Sequence[str]) -> dict[str, str]:
    (sample,) = dataset.read([index])
    images = read_latents([sample], [f"{role}.latent" for role in roles], LATENT)[0]
    names = {color: name for name, color in COLORS.items()}
    return {
        role: names[tuple(image[:, 0, 0].int().tolist())] for role, image in zip(roles, images, strict=True)
    }


def test_a_listing_carries_roles_and_splits_into_latent_shards(latents: ShardDataset) -> None:
    for index, (sample, (roles, num_text_tokens, _)) in enumerate(
        zip(latents.read(range(4)), EXPECTED, strict=True)
    ):
        assert image_roles(sample.parts) == sorted(roles)
        assert colors(latents, index, list(roles)) == roles
        assert latents.num_text_tokens[index] == num_text_tokens
    tree = json.loads(latents.read([3])[0].parts["json"])
    assert tree == {
        "files": ["blue.png", "red.png", "grey.png"],
        "origin": "a test",
        "splits": [
            {"text": "draw"},
            {"image": "image0", "target": True},
            {"image": "image0"},
            {"image": "image1"},
            {"text": "mix", "loss": True},
            {"image": "image2", "target": True},
        ],
    }
    assert read_captions(latents.read([3])[0]) == ["draw", "mix"]
    # Images as often as they stand there: blue is drawn and then seen.
    assert (latents.num_image_tokens // PX**2).tolist() == [2, 3, 4, 4]


@pytest.mark.parametrize("num_draws", [1, 2, 5])
def test_the_index_counts_what_a_pack_holds(latents: ShardDataset, num_draws: int) -> None:
    config = PackingConfig(10_000, 8, text_dropout=0, source_dropout=0, draws_per_caption=num_draws)
    packer = EditPacker(config, LATENT, Bytes())
    lengths = packer.lengths(latents)
    assert lengths.dtype == np.int64
    assert np.array_equal(lengths, packed_lengths(latents, LATENT, num_draws))
    for index, (_, _, num_targets) in enumerate(EXPECTED):
        batches = [
            packer.collate(latents.read([index]), step=0, stream=0, epochs=[epoch], seed=0)
            for epoch in range(8)
        ]
        # The longest of the captions is met within 8 epochs.
        assert lengths[index] == max(batch.attention.num_tokens for batch in batches)
        assert {batch.num_targets for batch in batches} == {num_targets + num_draws - 1}


def test_the_doctor_finds_no_fault_with_these_shards(pixels: Path, latents: ShardDataset) -> None:
    for directory in (pixels, pixels.parent / "latents"):
        problems = [problem.text for problem in diagnose(directory).problems]
        assert [
            text for text in problems if "latent statistics" not in text and "one value" not in text
        ] == []


def test_the_doctor_names_bad_splits(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (PX, PX)).save(buffer, "png")
    tree = {"splits": [{"text": "a"}, {"image": "image0"}]}
    sample = Sample("bad", {"image0.png": buffer.getvalue(), "json": json.dumps(tree).encode()})
    with ShardWriter(tmp_path, max_samples_per_shard=10, source="test", latent=None) as writer:
        writer.write(sample)
    (problem,) = diagnose(tmp_path).problems
    assert problem.text.endswith('sample \'bad\': bad splits: "splits" has no image with "target": true')


def test_tars_with_these_roles_are_copied_as_they_are(pixels: Path, tmp_path: Path) -> None:
    source = WebDatasetSource(sorted(pixels.glob("*.tar")))
    write_sources({tmp_path / "copy": source}, prepare=Preparation())
    before, after = (ShardDataset.open(directory).read(range(4)) for directory in (pixels, tmp_path / "copy"))
    for one, other in zip(before, after, strict=True):
        for part in image_parts(one.parts):
            assert one.parts[part] == other.parts[part]
        kept = json.loads(other.parts["json"])
        kept.pop("source_key")
        assert kept == json.loads(one.parts["json"])


def test_a_bad_interleaved_sample_is_not_encoded() -> None:
    sample = Sample("k", {"image0.png": b"x", "json": json.dumps({"splits": GOOD}).encode()})
    image = torch.zeros(1, 1, 3, PX, PX)
    encoded, num_image_tokens, num_text_tokens = latent_sample(sample, iter([image]), Bytes())
    assert (sorted(encoded.parts), num_image_tokens, num_text_tokens) == (["image0.latent", "json"], PX**2, 1)
    with pytest.raises(UserError, match="sample 'k': has a caption; give text_tokenizer"):
        latent_sample(sample, iter([image]), None)
    bad = Sample("k", {**sample.parts, "json": json.dumps({"splits": GOOD[1:]}).encode()})
    with pytest.raises(UserError, match="sample 'k': \"splits\" has no text"):
        latent_sample(bad, iter([image]), Bytes())
