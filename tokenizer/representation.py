"""The representation model E: a vision transformer whose patch tokens are the feature map f (paper 3.1).

Shapes: B batch, D width, Y X token grid, N = Y * X patch tokens, P prefix tokens (class and registers), S
input px.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import ConfigError
from tokenizer.backbones import Backbone, build_timm, output_weight
from tokenizer.config import RepresentationConfig
from tokenizer.transformers_backbone import build_transformers
from tokenizer.weights import check_fits, load_exact, read_tensors

SUM_NORM_EPS = 1e-6
"""eps of the LayerNorm that follows a sum of layers; DINOv2's value."""


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
