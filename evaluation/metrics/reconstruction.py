"""Scores of an image against its original, on 8-bit images: PSNR, SSIM and LPIPS, the RAE/RPiAE protocol.

PSNR is dB per image, then the mean of dB.

SSIM (Wang et al. 2004) has the definition of torchmetrics 1.9: borders are reflected and *count* in the mean. Before
torchmetrics' change #2721 (September 2024; 1.4.0 lacks it), and in scikit-image, a border of 5 px is left out, which
gives other scores. The definition stands here, so that it does not move with an installed version; tests/parity
compares.

LPIPS (Zhang et al. 2018) is v0.1 on VGG16, the network of the training loss.

Shapes: B images, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.weights import state_hash

Rounding = Literal["truncate", "round"]

# Equal images have no finite value. One wrong level in a 256 px image would be 101 dB.
MAX_DB = 100.0
WINDOW_SIGMA_PX = 1.5
WINDOW_PX = 11
C1, C2 = 0.01**2, 0.03**2  # SSIM's constants for a data range of 1
REMEDY = "give torchvision's .pth as --vgg16 FILE, or leave LPIPS out with --vgg16 none"


def to_uint8(pixels_01: Tensor, rounding: Rounding = "truncate") -> Tensor:
    """float [..., 3, H, W] -> uint8: clamped to [0, 1], times 255, *truncated* as the RAE evaluation does.

    `round` goes to the nearest level instead: closer by up to half a level, but comparable with no published number.
    """
    levels = pixels_01.float().clamp(0, 1) * 255
    return (levels.round() if rounding == "round" else levels).to(torch.uint8)


def psnr_db(image: Tensor, reference: Tensor, keep: Tensor | None = None) -> Tensor:
    """10 log10(255^2 / mean squared error) of each image, float64 [B], at most MAX_DB.

    `image`, `reference`: uint8 [B, 3, H, W]. `keep`: bool [B, H, W], the pixels that count (None: all); an
    image without such pixels gives nan.
    """
    _check_pairs(image, reference)
    squared = (image.double() - reference.double()).square().mean(1)
    if keep is None:
        keep = torch.ones_like(squared, dtype=torch.bool)
    mse = (squared * keep).sum((1, 2)) / keep.sum((1, 2))
    return (10 * torch.log10(255.0**2 / mse)).clamp(max=MAX_DB)


def ssim(image: Tensor, reference: Tensor) -> Tensor:
    """Mean of the SSIM map over channels and pixels, float64 [B], at most 1.

    `image`, `reference`: uint8 [B, 3, H, W]. Images of less than 6 px have no reflected border and give nan.
    """
    _check_pairs(image, reference)
    if min(image.shape[2:]) <= WINDOW_PX // 2:
        return torch.full((len(image),), math.nan, dtype=torch.float64)
    # One image at a time stays in the processor's cache: several times as fast as 32 images of 256 px together.
    return torch.stack([_ssim_of_one(*pair) for pair in zip(image, reference, strict=True)])


def _ssim_of_one(image_CHW: Tensor, reference_CHW: Tensor) -> Tensor:
    """SSIM of one image, uint8 [3, H, W] -> scalar, float64."""
    # fp64: in flat areas the variances below are differences of nearly equal numbers, beside C2 = 9e-4.
    x, y = image_CHW.double() / 255, reference_CHW.double() / 255
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = (_blur(x * x) - mean_x**2).clamp(min=0)
    variance_y = (_blur(y * y) - mean_y**2).clamp(min=0)
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + C1) / (mean_x**2 + mean_y**2 + C1)
    structure = (2 * covariance + C2) / (variance_x + variance_y + C2)
    return (luminance * structure).mean()


def _blur(x_CHW: Tensor) -> Tensor:
    """Gaussian mean over WINDOW_PX x WINDOW_PX, borders reflected; separable."""
    border = WINDOW_PX // 2
    offsets = torch.arange(-border, border + 1, dtype=x_CHW.dtype)
    weights = torch.exp(-((offsets / WINDOW_SIGMA_PX) ** 2) / 2)
    weights = weights / weights.sum()
    x = F.pad(x_CHW, (border,) * 4, mode="reflect")
    for dim in (1, 2):
        length = x.shape[dim] - 2 * border
        total = torch.zeros_like(x.narrow(dim, 0, length))
        for start, weight in enumerate(weights.tolist()):
            total.add_(x.narrow(dim, start, length), alpha=weight)
        x = total
    return x


class Lpips:
    """Distance of 8-bit images, scaled to [-1, 1] for the network. `fingerprint` hashes VGG16 and the heads."""

    def __init__(self, network: LpipsVgg16, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._network = network.to(self._device)
        self.fingerprint = state_hash(network)

    @classmethod
    def load(cls, vgg16_weights: str = "download", device: str = "cpu") -> Lpips:
        """`vgg16_weights`: `download`, or a path of torchvision's .pth. Raises UserError: cannot be read."""
        network = LpipsVgg16()
        network.load_vgg16(vgg16_weights, REMEDY)
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance of each image from its reference, float32 [B]; both uint8 [B, 3, H, W]."""
        _check_pairs(image, reference)
        image_01, reference_01 = (x.to(self._device).float() / 255 for x in (image, reference))
        distance: Tensor = self._network(image_01, self._network.reference(reference_01))
        return distance.cpu()


def _check_pairs(image: Tensor, reference: Tensor) -> None:
    assert image.dtype == reference.dtype == torch.uint8, "the protocol is defined on 8-bit images"
    assert image.shape == reference.shape and image.ndim == 4
