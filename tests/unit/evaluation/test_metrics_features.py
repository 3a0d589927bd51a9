"""Feature networks: FID's Inception on random weights of the right names, TF1's resize, representation models."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F

from base.config import ConfigError, UserError
from evaluation.downloads import fetch
from evaluation.features.inception import (
    WEIGHTS_SHA256,
    WEIGHTS_URL,
    AdmInception,
    InceptionFeatures,
    resize_tf1,
)
from evaluation.features.interface import extract
from evaluation.features.representation import RepresentationFeatures
from quickstart.config import StandInConfig
from quickstart.standin import IdentityObjective
from tokenizer.config import AutoencoderConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder

TINY = RepresentationConfig(
    name="vit_tiny_patch16_224",
    input_px=32,
    weights="random",
    overrides={"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
)


def scalar_resize(image: np.ndarray, size: int) -> np.ndarray:
    """TF1's kernel as its source reads, one number at a time; image fp32 [H, W]."""
    height, width = image.shape
    scale_y, scale_x = np.float32(height) / np.float32(size), np.float32(width) / np.float32(size)
    out = np.empty((size, size), np.float32)
    for i in range(size):
        y = np.float32(i) * scale_y
        y0 = math.floor(y)
        y1 = min(math.ceil(y), height - 1)
        for j in range(size):
            x = np.float32(j) * scale_x
            x0 = math.floor(x)
            x1 = min(math.ceil(x), width - 1)
            dx, dy = x - np.float32(x0), y - np.float32(y0)
            top = image[y0, x0] + (image[y0, x1] - image[y0, x0]) * dx
            bottom = image[y1, x0] + (image[y1, x1] - image[y1, x0]) * dx
            out[i, j] = top + (bottom - top) * dy
    return out


@pytest.mark.parametrize(("height", "width", "size"), [(16, 16, 37), (64, 48, 29), (29, 29, 29), (7, 50, 20)])
def test_resize_is_tf1s_to_the_bit(height: int, width: int, size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (2, 3, height, width), dtype=torch.uint8, generator=generator)
    found = resize_tf1(pixels, size)
    for b, c in ((0, 0), (1, 2)):
        expected = scalar_resize(pixels[b, c].float().numpy(), size)
        assert np.array_equal(found[b, c].numpy(), expected)  # the same fp32 operations in the same order


def test_resize_has_no_half_pixel_centres() -> None:
    # Two pixels to four: TF1 reads 0, 0.5, 1, 1.5; torch's bilinear reads -0.25, 0.25, 0.75, 1.25.
    pixels = torch.tensor([0, 100], dtype=torch.uint8).expand(1, 3, 2, 2)
    assert resize_tf1(pixels, 4)[0, 0, 0].tolist() == [0, 50, 100, 100]
    torchs = F.interpolate(pixels.float(), size=(4, 4), mode="bilinear")
    assert torchs[0, 0, 0].tolist() == [0, 25, 75, 100]


def published_state(seed: int = 0) -> dict[str, Tensor]:
    """Random weights under torchvision's names and shapes, which the published file uses, with 1008 classes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        names = torchvision.models.inception_v3(
            weights=None, aux_logits=False, num_classes=1008, init_weights=False
        ).state_dict()
    state = {}
    for name, like in names.items():
        if name.endswith("num_batches_tracked"):
            continue  # as in the file, which is older than this counter
        fan_in = math.prod(like.shape[1:])
        values = torch.randn(like.shape, generator=generator)
        if "running_var" in name or name.endswith("bn.weight"):
            values = 1 + 0.1 * values.clamp(-3, 3)
        elif like.ndim > 1:
            values = values * (2 / fan_in) ** 0.5  # He: activations keep their size through 20 layers
        else:
            values = 0.1 * values
        state[name] = values
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(published_state(), path)
    return path


def reference_average_pool() -> Callable[..., Tensor]:
    """What stands for torchvision's 3 x 3 average: a mean over existing pixels, and the ninth time a maximum."""
    calls = 0

    def pool(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
        nonlocal calls
        calls += 1
        cells = F.unfold(x, kernel_size, padding=padding, stride=stride).unflatten(1, (x.shape[1], -1))
        inside = F.unfold(torch.ones_like(x[:, :1]), kernel_size, padding=padding, stride=stride)[:, None]
        if calls == 9:
            pooled = cells.masked_fill(inside == 0, -math.inf).amax(dim=2)
        else:
            pooled = cells.sum(dim=2) / inside.sum(dim=2)
        return pooled.unflatten(2, x.shape[2:])

    return pool


def test_inception_is_torchvisions_but_for_its_pools(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = InceptionFeatures.load(str(weights))
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(256, (2, 3, 40, 56), dtype=torch.uint8, generator=generator)
    found = features(pixels)
    assert found.shape == (2, features.dim) == (2, 2048) and found.dtype == torch.float32
    theirs = torchvision.models.inception_v3(
        weights=None, aux_logits=False, num_classes=1008, init_weights=False
    ).eval()
    theirs.load_state_dict(published_state(), strict=False)  # counters stay as they are
    theirs.fc = torch.nn.Identity()
    x = (torch.stack([resize_tf1(image[None], 299)[0] for image in pixels]) - 128) / 128
    with torch.no_grad():
        plain = theirs(x)
        monkeypatch.setattr("torchvision.models.inception.F.avg_pool2d", reference_average_pool())
        expected = theirs(x)
    # fp32 through 94 convolutions; the pools themselves make a thousand times that difference.
    scale = float(expected.abs().mean())
    assert scale > 0.05 and float((plain - expected).abs().mean()) > 0.01 * scale
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * scale)


def test_inception_sees_minus_one_for_black_and_just_less_than_one_for_white() -> None:
    levels = torch.tensor([0, 64, 128, 255], dtype=torch.uint8)
    seen = InceptionFeatures(torch.nn.Flatten())(levels[:, None, None, None].expand(-1, 3, 7, 9))
    assert seen.shape == (4, 3 * 299 * 299)
    expected = torch.tensor([-1.0, -0.5, 0.0, 127 / 128])[:, None].expand_as(seen)
    assert torch.equal(seen, expected)  # powers of two: exact


def test_inception_does_not_depend_on_the_batch_and_names_its_weights(weights: Path) -> None:
    features = InceptionFeatures.load(str(weights))
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (3, 3, 24, 24), dtype=torch.uint8, generator=generator)
    together = extract(features, pixels)
    # Convolutions of other batch sizes may run other kernels: fp32 rounding through 94 of them.
    torch.testing.assert_close(features(pixels[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
    assert features.protocol["weights"] == "not the published file"
    assert InceptionFeatures.load(str(weights)).fingerprint == features.fingerprint


def test_adms_inception_gives_pool3_and_seven_spatial_channels_of_the_file(
    weights: Path, tmp_path: Path
) -> None:
    features = AdmInception.load(str(weights))
    assert (features.pool_dim, features.dim) == (2048, 2048 + 17 * 17 * 7)
    assert torch.equal(features.classifier, published_state()["fc.weight"])
    pixels = torch.randint(256, (1, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    pool, spatial = features(pixels).split([2048, 17 * 17 * 7], dim=1)
    assert torch.equal(pool, InceptionFeatures.load(str(weights))(pixels))
    assert (spatial >= 0).all() and spatial.max() > 0  # after the activation
    headless = {name: tensor for name, tensor in published_state().items() if not name.startswith("fc.")}
    torch.save(headless, tmp_path / "headless.pth")
    with pytest.raises(UserError, match=r"has no fc\.weight, which the inception score needs"):
        AdmInception.load(str(tmp_path / "headless.pth"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("Mixed_6c.branch7x7dbl_3.bn.running_var"),
            "missing: Mixed_6c.branch7x7dbl_3",
        ),
        (lambda state: state.update({"AuxLogits.fc.bias": torch.zeros(2)}), "unexpected: AuxLogits.fc.bias"),
        (
            lambda state: state.update({"Conv2d_1a_3x3.conv.weight": torch.zeros(32, 1, 3, 3)}),
            "of another shape: Conv2d_1a_3x3.conv.weight",
        ),
    ],
)
def test_every_tensor_of_the_file_is_accounted_for(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    state = published_state()
    change(state)
    torch.save(state, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=message):
        InceptionFeatures.load(str(tmp_path / "weights.pth"))


def test_weights_that_are_no_weights_are_one_clear_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="no such weights file"):
        InceptionFeatures.load(str(path))
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="not a readable weights file"):
        InceptionFeatures.load(str(path))
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="plain state dict"):
        InceptionFeatures.load(str(path))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Malicious:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
            return (Path.touch, (tmp_path / "was-run",))  # type: ignore[return-value]

    torch.save({"fc.weight": Malicious()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="would run code of its authors"):
        InceptionFeatures.load(str(tmp_path / "weights.pth"))
    assert not (tmp_path / "was-run").exists()


def test_a_download_is_kept_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    source = tmp_path / "file-1.bin"
    source.write_bytes(b"weights")
    sha256 = "9" * 64
    with pytest.raises(UserError, match=r"cannot be had \(invalid hash value.*give a path"):
        fetch(source.as_uri(), sha256, "give a path")
    found = fetch(source.as_uri(), None, "give a path")
    assert found.read_bytes() == b"weights"
    source.unlink()
    assert fetch(source.as_uri(), None, "give a path") == found  # from the cache
    with pytest.raises(UserError, match="is not the published file"):
        fetch(source.as_uri(), sha256, "give a path")
    with pytest.raises(UserError, match=r"cannot be had \("):
        fetch((tmp_path / "absent.bin").as_uri(), None, "give a path")


def test_the_published_files_name_holds_the_start_of_the_pinned_hash() -> None:
    assert WEIGHTS_URL.endswith(f"-{WEIGHTS_SHA256[:8]}.pth") and len(WEIGHTS_SHA256) == 64


def tiny_representation() -> Representation:
    torch.manual_seed(0)
    return Representation(TINY)


def test_representation_features_are_the_mean_patch_or_the_class_token() -> None:
    model = tiny_representation()
    pixels = torch.randint(256, (3, 3, 48, 48), dtype=torch.uint8)
    patch, token = (RepresentationFeatures("tiny", model, kind) for kind in ("mean_patch", "class"))
    normed: list[Tensor] = []
    model.vit.norm.register_forward_hook(lambda _, __, output: normed.append(output))
    with torch.no_grad():
        expected = model(pixels.float() / 255).mean(dim=(2, 3))
    tokens = normed[0]  # as timm itself computes them: class token, then patches
    torch.testing.assert_close(patch(pixels), expected)
    torch.testing.assert_close(token(pixels), tokens[:, 0])
    torch.testing.assert_close(patch(pixels), tokens[:, 1:].mean(dim=1))
    assert patch.fingerprint != token.fingerprint


def test_a_model_without_class_token_says_so() -> None:
    overrides = {**TINY.overrides, "class_token": False}
    torch.manual_seed(0)
    model = Representation(
        RepresentationConfig(TINY.name, TINY.input_px, weights="random", overrides=overrides)
    )
    with pytest.raises(ConfigError, match="has no class token"):
        RepresentationFeatures("tiny", model, "class")(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))


def test_features_come_from_the_export_of_a_standin_or_of_an_autoencoder(tmp_path: Path) -> None:
    objective = IdentityObjective(StandInConfig(TINY, num_classes=4))
    standin = tmp_path / "standin" / "export"
    standin.mkdir(parents=True)
    objective.export(standin)
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    loaded = RepresentationFeatures.load(standin)
    direct = RepresentationFeatures("standin", objective.model.representation)
    assert loaded.name == "standin" and loaded.dim == 24
    assert torch.equal(loaded(pixels), direct(pixels)) and loaded.fingerprint == direct.fingerprint
    torch.manual_seed(1)
    autoencoder = Autoencoder(
        AutoencoderConfig(TINY, PixelDecoderConfig(24, 1, 2, 48, 8), image_px=32)
    ).eval()
    autoencoder.save(tmp_path / "decoder" / "export")
    loaded = RepresentationFeatures.load(tmp_path / "decoder" / "export")
    direct = RepresentationFeatures("decoder", autoencoder.encoder)
    assert torch.equal(loaded(pixels), direct(pixels)) and loaded.fingerprint == direct.fingerprint
    with pytest.raises(UserError, match="export of an autoencoder or of a stand-in"):
        RepresentationFeatures.load(tmp_path)
    assert loaded.protocol["network"] == f"decoder ({TINY.name})"
