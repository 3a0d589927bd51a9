"""Perceptual distances: LPIPS on VGG16, or a stand-in for it on a frozen representation model.

Shapes: B batch, C channels, H W pixels or feature cells, N patch tokens, D width.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from base.bounds import Amount
from base.config import ConfigError, UserError
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.representation import Representation, RepresentationConfig
from tokenizer.training import half_distance
from tokenizer.weights import freeze, load_exact

VGG16_BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))
"""(channels, convolutions) between two poolings; LPIPS compares the last activation of each block."""
NORM_EPS = 1e-10
TRAINING_REMEDY = (
    "set stage.perceptual.vgg16_weights to a local .pth, or stage.perceptual.kind to 'representation'"
)
# LPIPS's own normalisation of pixels in [-1, 1], close to ImageNet's mean and deviation.
LPIPS_SHIFT = (-0.030, -0.088, -0.188)
LPIPS_SCALE = (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class PerceptualConfig:
    """The kind of perceptual distance, and the networks that it needs."""

    kind: Literal["lpips_vgg16", "representation", "none"] = "lpips_vgg16"
    """LPIPS (paper), distance of a frozen representation model's patch features, or no perceptual loss."""
    vgg16_weights: str = "download"
    """For lpips_vgg16: `download` (torchvision's ImageNet weights), the path of that .pth file, or `random`
    (to measure memory and time only)."""
    representation: RepresentationConfig | None = None
    """For representation: the frozen model."""
    depths: tuple[Amount, ...] = ()
    """For representation: blocks (0-based, increasing) whose patch features are compared."""


class Perceptual(nn.Module):
    """A frozen distance between images. A caller computes the reference's features once and passes them on."""

    def features(self, pixels_01: Tensor) -> list[Tensor]:
        """The features that two images are compared by, one tensor per level; differentiable towards the pixels."""
        raise NotImplementedError

    def compare(self, features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """The distance of each image, [B] fp32."""
        raise NotImplementedError

    def describe(self) -> str:
        """A description of the distance, in one line."""
        raise NotImplementedError

    @torch.no_grad()
    def reference(self, pixels_01: Tensor) -> list[Tensor]:
        """Features of the originals, without a graph."""
        return self.features(pixels_01)

    def forward(self, pixels_hat: Tensor, reference: Sequence[Tensor]) -> Tensor:
        """[B, 3, H, W] about [0, 1] and `reference(originals)` -> distance of each image, [B] fp32."""
        return self.compare(self.features(pixels_hat), reference)


class LpipsVgg16(Perceptual):
    """LPIPS v0.1 (Zhang et al. 2018): weighted squared differences of unit-normalised VGG16 features."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        """Random VGG16 convolutions, to be loaded, and the trained linear heads of the lpips package."""
        super().__init__()
        self.vgg = _vgg16_layers()
        self.linears = nn.ParameterList(torch.zeros(1, channels, 1, 1) for channels, _ in VGG16_BLOCKS)
        self.register_buffer("shift", torch.tensor(LPIPS_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(LPIPS_SCALE).view(3, 1, 1), persistent=False)
        self._load_linears()
        freeze(self)

    def features(self, pixels_01: Tensor) -> list[Tensor]:
        """Unit-normalised VGG16 features, [B, C, H, W] per block."""
        x = (2.0 * pixels_01 - 1.0 - self.shift) / self.scale
        if self._dtype != torch.float32:  # convolutions keep the order of their input
            x = x.to(self._dtype, memory_format=torch.channels_last)
        blocks = []
        for layer in self.vgg:
            if isinstance(layer, nn.MaxPool2d):
                blocks.append(x)
            x = layer(x)
        if self._dtype != torch.float32:
            return [half_distance.unit(block, NORM_EPS) for block in (*blocks, x)]
        return [_unit(block) for block in (*blocks, x)]

    def compare(self, features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """Sum over blocks of the spatial mean of the weighted squared difference, [B] fp32."""
        blocks = zip(self.linears, features, reference, strict=True)
        distance = _distance if self._dtype == torch.float32 else half_distance.distance
        return torch.stack([distance(a, b, weight) for weight, a, b in blocks]).sum(dim=0)

    def load_vgg16(self, weights: str, remedy: str) -> None:
        """Reads torchvision's VGG16: `download`, or the path of its .pth file.

        Raises UserError: weights that cannot be read or downloaded; the message ends with `remedy`, what a user can do.
        """
        try:
            if weights == "download":
                entry = torchvision.models.VGG16_Weights.IMAGENET1K_V1
                state = entry.get_state_dict(progress=False, check_hash=True)
            else:
                state = read_checkpoint(weights).tensors
        except (OSError, UserError) as error:
            raise UserError(
                f"VGG16 weights ({weights}) cannot be had ({' '.join(str(error).split())}); {remedy}"
            ) from None
        prefix = "features."
        layers = {
            name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)
        }
        load_exact(self.vgg, layers, weights)

    def describe(self) -> str:
        """A description of the distance, in one line."""
        return "perceptual loss: LPIPS v0.1 on VGG16"

    @property
    def _dtype(self) -> torch.dtype:
        """What the convolutions hold: fp32, or what tokenizer/frozen.py cast them to."""
        weight = self.vgg[0].weight
        assert isinstance(weight, Tensor)
        return weight.dtype

    def _load_linears(self) -> None:
        path = importlib.resources.files("lpips") / "weights" / "v0.1" / "vgg.pth"
        with importlib.resources.as_file(path) as file:
            heads = torch.load(file, map_location="cpu", weights_only=True)
        with torch.no_grad():
            for level, weight in enumerate(self.linears):
                weight.copy_(heads[f"lin{level}.model.1.weight"])


class RepresentationDistance(Perceptual):
    """Squared distance of unit-normalised patch features of a frozen model, mean over tokens and depths."""

    def __init__(self, config: RepresentationConfig, depths: tuple[int, ...]) -> None:
        super().__init__()
        self.representation = Representation(config)
        self.representation.check_depths(depths, "perceptual")
        self.depths = depths
        freeze(self)

    def features(self, pixels_01: Tensor) -> list[Tensor]:
        """Unit-normalised patch tokens, [B, N, D] per depth."""
        levels = self.representation.intermediates(pixels_01, self.depths)
        return [F.normalize(patches.float(), dim=2) for patches, _ in levels]

    def compare(self, features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
        """Mean over depths and tokens of |a - b|^2, [B] fp32, in [0, 4]."""
        levels = zip(features, reference, strict=True)
        return torch.stack([(a - b).square().sum(dim=2).mean(dim=1) for a, b in levels]).mean(dim=0)

    def describe(self) -> str:
        """A description of the distance, in one line."""
        name, depths = self.representation.config.name, list(self.depths)
        return f"perceptual loss: patch features of frozen {name} at depths {depths}, in place of LPIPS"


def build_perceptual(config: PerceptualConfig) -> Perceptual | None:
    """The frozen distance, or None. Raises UserError: weights that cannot be read, an incomplete section."""
    if config.kind == "none":
        return None
    if config.kind == "representation":
        if config.representation is None:
            raise ConfigError("perceptual.kind 'representation' needs the section perceptual.representation")
        return RepresentationDistance(config.representation, config.depths)
    lpips = LpipsVgg16()
    if config.vgg16_weights != "random":
        lpips.load_vgg16(config.vgg16_weights, TRAINING_REMEDY)
    return lpips


def _vgg16_layers() -> nn.Sequential:
    """VGG16's convolutions up to relu5_3, numbered as torchvision's `features`."""
    layers: list[nn.Module] = []
    in_channels = 3
    for channels, num_convolutions in VGG16_BLOCKS:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for _ in range(num_convolutions):
            layers += [nn.Conv2d(in_channels, channels, 3, padding=1), nn.ReLU()]
            in_channels = channels
    return nn.Sequential(*layers)


def _unit(x_BCHW: Tensor) -> Tensor:
    """Every cell's channel vector divided by its length."""
    # vector_norm: a cell where every channel is 0 gets gradient 0; sqrt(sum) would give NaN there.
    length: Tensor = torch.linalg.vector_norm(x_BCHW, dim=1, keepdim=True)
    return x_BCHW / (length + NORM_EPS)


def _distance(a_BCHW: Tensor, b_BCHW: Tensor, weight_1C11: Tensor) -> Tensor:
    """Spatial mean of the weighted squared difference, [B] fp32."""
    return ((a_BCHW - b_BCHW).square() * weight_1C11).sum(dim=1).float().mean(dim=(1, 2))
