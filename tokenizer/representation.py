"""The representation model E: a vision transformer whose patch tokens are the feature map f (paper 3.1).

Shapes: B batch, D width, Y X token grid, N = Y * X patch tokens, P prefix tokens (class and registers), S
input px.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import ConfigError
from tokenizer import model_names
from tokenizer.backbones import Backbone, build_timm, output_weight
from tokenizer.transformers_backbone import build_transformers
from tokenizer.weights import check_fits, load_exact, read_tensors

SUM_NORM_EPS = 1e-6
"""eps of the LayerNorm that follows a sum of layers; DINOv2's value."""


MIN_STD = 1e-6
"""Least `std` that a config may give. Pixels in [0, 1] have 256 steps, so no model's pixels vary less."""


@dataclass(frozen=True)
class RepresentationConfig:
    """The vision transformer, and how images enter it."""

    name: str
    """A short name (tokenizer/model_names.py: dinov2-b-reg, dinov3-l, siglip2-b, mae-b...) or the library's
    own: a timm model, a repository on the Hugging Face hub, a folder that transformers wrote."""
    input_px: int = 0
    """Side of the square the image is resized to (bicubic) before the model; a multiple of the patch size.
    0: the short name's, for 16x16 tokens (224 for patch 14, 256 for patch 16)."""
    weights: str = "pretrained"
    """Initial weights: `pretrained` (the library's download), `random`, or the path of a safetensors file."""
    overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """timm: arguments for create_model: img_size, depth, embed_dim, num_heads, dynamic_img_size...
    transformers: fields of the model's config (hidden_size, num_hidden_layers...); with `model_type`, an
    architecture that needs neither short name nor download."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of pixels in [0, 1]; None: the one the model was trained with."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation; None: the one the model was trained with."""
    library: Literal["timm", "transformers"] = "timm"
    """The library that builds the model. It decides the names of the weights and how position tables are resampled,
    so an export keeps its library."""
    num_summed_layers: int = 1
    """k: f is the LayerNorm of the sum of the last k blocks' patch tokens. k = 1, the last block alone, is the paper's.
    RAEv2 (arXiv 2605.18324) finds that sums over more blocks reconstruct better. Normalising after the sum is our
    choice: f keeps its scale."""

    def __post_init__(self) -> None:
        if self.input_px == 0:
            known = model_names.find(self.name)
            if known is None:
                hint = model_names.closest(self.name, [])
                raise ConfigError(f"representation '{self.name}' is no short name: give input_px; {hint}")
            object.__setattr__(self, "input_px", known.input_px)
        if self.input_px < 1:
            raise ConfigError(f"input_px is {self.input_px}; give at least 1, or 0 for the short name's")
        if not all(map(math.isfinite, (*(self.mean or ()), *(self.std or ())))):
            raise ConfigError(f"mean {self.mean} and std {self.std} must be finite")
        if self.std is not None and min(self.std) < MIN_STD:
            raise ConfigError(f"std is {self.std}; pixels in [0, 1] need at least {MIN_STD}")
        if self.num_summed_layers < 1:
            raise ConfigError(f"num_summed_layers is {self.num_summed_layers}; give at least 1")


def check_rebuildable(config: RepresentationConfig) -> None:
    """Raises ConfigError: a name that sends timm to a folder or repository for the model's shape.

    An export is rebuilt from its config.json alone, and a stranger's config.json must not choose what timm reads.
    """
    if config.library == "timm" and ":" in config.name:
        raise ConfigError(
            f"representation.name '{config.name}': an export is not built from a folder or repository; give timm's "
            "name of the architecture, and the file in representation.weights"
        )


def without_weights(config: RepresentationConfig) -> RepresentationConfig:
    """`config` with random weights, so that nothing is downloaded."""
    return dataclasses.replace(config, weights="random")


class Representation(nn.Module):
    """pixels_01 -> f: resize, normalise, transformer, last LayerNorm without affine, patch tokens only.

    Attributes: `width` D, `depth` (blocks), `grid` (Y, X), `mean`, `std` (three floats each),
    `has_class_token`; `vit`, the library's module, only for saving and loading under the library's names.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: RepresentationConfig) -> None:
        super().__init__()
        self.config = config
        tensors = None if config.weights in ("pretrained", "random") else read_tensors(config.weights)
        if tensors is not None:
            check_fits(lambda: _build(config).vit, tensors, config.weights)
        self._backbone = _build(config)
        self.vit = self._backbone.vit
        traits = self._backbone.traits
        self.width, self.depth = traits.width, traits.depth
        if config.num_summed_layers > self.depth:
            raise ConfigError(
                f"{config.name}: has {self.depth} blocks; num_summed_layers {config.num_summed_layers} is more"
            )
        self.has_class_token = traits.has_class_token
        patch_y, patch_x = traits.patch_px
        if config.input_px % patch_y or config.input_px % patch_x:
            raise ConfigError(
                f"{config.name}: input_px {config.input_px} is no multiple of the patch {patch_y}"
            )
        self.grid = (config.input_px // patch_y, config.input_px // patch_x)
        self.mean, self.std = config.mean or traits.mean, config.std or traits.std
        self.register_buffer("pixel_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        if tensors is not None:
            load_exact(self.vit, tensors, config.weights)

    @property
    def last_mlp_weight(self) -> nn.Parameter:
        """W of the adaptive pivot weight: the last MLP's output layer, [D, hidden] (paper eq. 4)."""
        return output_weight(self._backbone.last_mlp)

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        return self._backbone.blocks

    def checkpoint_activations(self) -> None:
        """Activation checkpointing: less memory for more time in training (tokenizer/backbones.py)."""
        self._backbone.checkpoint_activations()

    def forward(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> f [B, D, Y, X], every token with mean 0 and variance 1 over D."""
        if self.config.num_summed_layers == 1:
            tokens_BND = self._backbone.patch_tokens(self._prepare(pixels_01))
        else:
            depths = range(self.depth - self.config.num_summed_layers, self.depth)
            summed = sum(patches for patches, _ in self.intermediates(pixels_01, depths))
            assert isinstance(summed, Tensor)
            tokens_BND = F.layer_norm(summed, (self.width,), eps=SUM_NORM_EPS)
        return tokens_BND.transpose(1, 2).reshape(-1, self.width, *self.grid)

    def intermediates(self, pixels_01: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Tokens after each block in `depths` (0-based): patches [B, N, D] and prefix [B, P, D]."""
        return self._backbone.intermediates(self._prepare(pixels_01), depths)

    def check_depths(self, depths: Sequence[int], where: str) -> None:
        """Raises ConfigError unless `depths` are increasing block numbers of this model."""
        if not depths or list(depths) != sorted(set(depths)) or depths[0] < 0 or depths[-1] >= self.depth:
            raise ConfigError(f"{where}: depths {list(depths)} must increase within 0..{self.depth - 1}")

    def _prepare(self, pixels_01: Tensor) -> Tensor:
        size_px = (self.config.input_px, self.config.input_px)
        if pixels_01.shape[-2:] != size_px:
            pixels_01 = F.interpolate(pixels_01, size=size_px, mode="bicubic", align_corners=False)
        return (pixels_01 - self.pixel_mean) / self.pixel_std


def _build(config: RepresentationConfig) -> Backbone:
    pretrained = config.weights == "pretrained"
    if config.library == "timm":
        return build_timm(config.name, config.input_px, pretrained=pretrained, overrides=config.overrides)
    return build_transformers(config.name, pretrained=pretrained, overrides=config.overrides)
