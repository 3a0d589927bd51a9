"""Features on disk: the same bytes after kills and on any number of ranks; images read in place."""

import math
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, Dinov2Config, Dinov2Model

from base.config import UserError
from evaluation.features import feature_files
from evaluation.features.feature_files import FeatureFiles, FeatureRows, ScoreFiles
from evaluation.features.inception import AdmInception
from evaluation.features.vision_transformers import VisionFeatures
from evaluation.image_source import FileImages, NpzImages
from evaluation.reference import Reference


class Colours:
    """Means of channels and quadrants; counts its calls, and can be killed after some."""

    name, fingerprint, dim = "colours", "colours-1", 6
    protocol: ClassVar = {"network": "means"}

    def __init__(self, die_after: int | None = None) -> None:
        self.num_images, self._die_after = 0, die_after

    def __call__(self, pixels: Tensor) -> Tensor:
        self.num_images += len(pixels)
        if self._die_after is not None and self.num_images > self._die_after:
            raise KeyboardInterrupt
        half = pixels.float() / 255
        return torch.cat([half.mean((2, 3)), half[:, :, :2, :2].mean((2, 3))], dim=1)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (150, 4, 6, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", arr_0=pixels, labels=np.arange(150))
    return tmp_path / "images.npz"


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "SHARD_IMAGES", 64)
    monkeypatch.setattr(feature_files, "IMAGES_PER_CALL", 16)


def tree(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_an_npz_array_is_read_in_place(npz: Path) -> None:
    images = NpzImages.open(npz)
    expected = np.load(npz)["arr_0"]
    assert len(images) == 150
    assert np.array_equal(images.read(7, 20).permute(0, 2, 3, 1).numpy(), expected[7:20])


def test_other_npz_files_are_one_clear_line(tmp_path: Path) -> None:
    pixels = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez_compressed(tmp_path / "small.npz", arr_0=pixels)
    np.savez(tmp_path / "float.npz", arr_0=pixels.astype(np.float32))
    np.savez(tmp_path / "named.npz", images=pixels)
    (tmp_path / "page.npz").write_text("<html>")
    for name, message in (
        ("small", "are compressed"),
        ("float", "expected uint8"),
        ("named", "has no array 'arr_0'"),
        ("page", "is no .npz file"),
        ("absent", "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            NpzImages.open(tmp_path / f"{name}.npz")


@pytest.mark.parametrize("array", ["arr_0", "mu"])
def test_a_damaged_npz_is_one_clear_line_wherever_it_is_damaged(array: str, tmp_path: Path) -> None:
    """A cut, or another byte, at any place of the archive; a header that asks for terabytes."""
    path = tmp_path / "a.npz"
    arrays = {"mu": np.zeros(2), "sigma": np.eye(2)}
    if array == "arr_0":
        arrays = {"arr_0": np.zeros((2, 4, 4, 3), np.uint8)}
    np.savez(path, **arrays)
    whole = path.read_bytes()
    Reference.open(path)
    damaged = [whole[:at] for at in range(0, len(whole), 23)]
    damaged += [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 7)]
    damaged.append(whole.replace(b"(2,), }" + b" " * 12, b"(1099511627776,), }"))
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            Reference.open(path)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > 30


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path: Path) -> None:
    for name, level in (("b.png", 20), ("a.png", 10), ("c/0.png", 30)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4), (level, 0, 0)).save(tmp_path / name)
    images = FileImages.of_folder(tmp_path)
    assert images.read(0, 3)[:, 0, 0, 0].tolist() == [10, 20, 30]
    digest = images.digest
    Image.new("RGB", (4, 4), (11, 0, 0)).save(tmp_path / "a.png")
    assert FileImages.of_folder(tmp_path).digest != digest
    Image.new("RGB", (4, 5)).save(tmp_path / "b.png")
    with pytest.raises(UserError, match=r"b\.png: images of one set must be of one size"):
        images.read(0, 2)


def test_features_come_back_as_the_network_gave_them(npz: Path, tmp_path: Path) -> None:
    source = NpzImages.open(npz)
    stored = FeatureFiles(tmp_path / "store", Colours(), source)
    stored.collect()
    expected = Colours()(source.read(0, 150))
    assert torch.equal(torch.cat(list(stored.blocks(40))), expected)
    rows = FeatureRows(stored, 2, 5)
    assert torch.equal(rows.take([149, 3, 64]), expected[[149, 3, 64], 2:5])
    again = Colours()
    FeatureFiles(tmp_path / "store", again, source).collect()
    assert again.num_images == 0


@pytest.mark.parametrize("die_after", [0, 16, 70, 149])
def test_a_killed_collection_goes_on_to_the_same_bytes(npz: Path, tmp_path: Path, die_after: int) -> None:
    source = NpzImages.open(npz)
    FeatureFiles(tmp_path / "whole", Colours(), source).collect()
    with pytest.raises(KeyboardInterrupt):
        FeatureFiles(tmp_path / "killed", Colours(die_after), source).collect()
    for path in (tmp_path / "killed").rglob("*.f32"):
        with path.open("ab") as file:
            file.write(b"torn" if path.stat().st_size < 64 * 24 else b"")  # a block that was being written
    with pytest.raises(UserError, match="not complete"):
        FeatureFiles(tmp_path / "killed", Colours(), source).read(140, 150)
    second = Colours()
    FeatureFiles(tmp_path / "killed", second, source).collect()
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
    assert second.num_images == 150 - die_after // 16 * 16


def test_ranks_together_write_what_one_writes(npz: Path, tmp_path: Path) -> None:
    source = NpzImages.open(npz)
    FeatureFiles(tmp_path / "one", Colours(), source).collect()
    for rank in range(2):
        FeatureFiles(tmp_path / "two", Colours(), source).collect(rank, 2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


def test_features_of_other_images_or_networks_are_never_taken_for_these(npz: Path, tmp_path: Path) -> None:
    FeatureFiles(tmp_path / "store", Colours(), NpzImages.open(npz)).collect()
    pixels = np.load(npz)["arr_0"].copy()
    pixels[3] += 1
    np.savez(tmp_path / "changed.npz", arr_0=pixels)
    changed = Colours()
    FeatureFiles(tmp_path / "store", changed, NpzImages.open(tmp_path / "changed.npz")).collect()
    assert changed.num_images == 150


def test_features_that_are_not_finite_are_refused(npz: Path, tmp_path: Path) -> None:
    class Broken(Colours):
        def __call__(self, pixels: Tensor) -> Tensor:
            return super().__call__(pixels) / 0

    with pytest.raises(UserError, match="images 0 to 15 are not finite"):
        FeatureFiles(tmp_path / "store", Broken(), NpzImages.open(npz)).collect()


def test_scores_are_kept_to_the_last_digit_and_may_be_undefined(npz: Path, tmp_path: Path) -> None:
    class Scores(Colours):
        def __init__(self, last: float) -> None:
            super().__init__()
            self._last = last

        def __call__(self, pixels: Tensor) -> Tensor:
            scores = super().__call__(pixels).double() / 3
            scores[-1, 0] = self._last
            return scores

    source = NpzImages.open(npz)
    stored = ScoreFiles(tmp_path / "store", Scores(math.nan), source)
    stored.collect()
    found = stored.read(0, 16)
    assert torch.equal(found[:15], Colours()(source.read(0, 15)).double() / 3)
    assert math.isnan(found[15, 0]) and bool(found[15, 1:].isfinite().all())
    features = FeatureFiles(tmp_path / "store", Colours(), source)  # the same hashes, another kind of rows
    with pytest.raises(UserError, match="not complete"):
        features.read(0, 16)
    with pytest.raises(UserError, match="scores of images 0 to 15 are not finite"):
        ScoreFiles(tmp_path / "other", Scores(math.inf), source).collect()


def test_spatial_features_are_seven_channels_in_adms_order() -> None:
    layer = nn.Conv2d(3, 9, 1, stride=100)  # 299 px -> 3 x 3 cells

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).mean((2, 3))

    network = Network()
    features = AdmInception(network, layer, torch.zeros(5, 9))
    assert (features.pool_dim, features.dim) == (9, 9 + 3 * 3 * 7)
    pixels = torch.randint(256, (2, 3, 299, 299), dtype=torch.uint8)
    found = features(pixels)
    with torch.no_grad():
        cells = layer((pixels.float() - 128) / 128)
    assert torch.equal(found[:, :9], cells.mean((2, 3)))
    assert found[1, 9 + (1 * 3 + 2) * 7 + 4] == cells[1, 4, 1, 2]  # y, x, channel


def test_dinov2_gives_the_normed_class_token_and_clip_the_embedding() -> None:
    torch.manual_seed(0)
    dino = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    )
    clip = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=32,
            patch_size=16,
            projection_dim=8,
        )
    )
    pixels = torch.randint(256, (3, 3, 28, 28), dtype=torch.uint8)
    features = VisionFeatures("dinov2", dino, 28)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        expected = dino(pixel_values=x).pooler_output
    torch.testing.assert_close(features(pixels), expected)
    embedding = VisionFeatures("clip", clip, 32)
    assert embedding.dim == 8 and embedding(pixels).shape == (3, 8)
    assert embedding.fingerprint != features.fingerprint


def test_weights_that_cannot_be_had_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be had"):
        VisionFeatures.load("dinov2", str(tmp_path / "absent"))
