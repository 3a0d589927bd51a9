"""The representation model E: a timm vision transformer whose patch tokens are the feature map f (paper 3.1).

Shapes: B batch, D width, Y X token grid, N = Y * X patch tokens, P prefix tokens (class and registers), S
input px.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ConfigError, UserError
from tokenizer.weights import load_exact, read_tensors


@dataclass(frozen=True)
class RepresentationConfig:
    """Which vision transformer, and how images enter it."""

    name: str
    """Model name in the library, e.g. vit_base_patch14_reg4_dinov2.lvd142m."""
    input_px: int
    """Side of the square the image is resized to (bicubic) before the model; a multiple of the patch size."""
    weights: str = "pretrained"
    """Initial weights: `pretrained` (the library's download), `random`, or the path of a safetensors file."""
    overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """Arguments for timm.create_model: img_size, depth, embed_dim, num_heads, dynamic_img_size..."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of pixels in [0, 1]; None: the one the model was trained with."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation; None: the one the model was trained with."""
    library: Literal["timm"] = "timm"
    """Where the model comes from."""


class Representation(nn.Module):
    """pixels_01 -> f: resize, normalise, transformer, last LayerNorm without affine, patch tokens only.

    Attributes: `width` D, `grid` (Y, X), `mean`, `std` (three floats each).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, config: RepresentationConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = _create(config)
        self.width = int(self.vit.embed_dim)
        patch_y, patch_x = self.vit.patch_embed.patch_size
        if config.input_px % patch_y or config.input_px % patch_x:
            raise ConfigError(
                f"{config.name}: input_px {config.input_px} is no multiple of the patch {patch_y}"
            )
        self.grid = (config.input_px // patch_y, config.input_px // patch_x)
        self.mean = tuple(float(value) for value in config.mean or self.vit.pretrained_cfg["mean"])
        self.std = tuple(float(value) for value in config.std or self.vit.pretrained_cfg["std"])
        self.register_buffer("pixel_mean", torch.tensor(self.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(self.std).view(3, 1, 1), persistent=False)
        if config.weights not in ("pretrained", "random"):
            load_exact(self.vit, read_tensors(config.weights), config.weights)

    @property
    def last_mlp_weight(self) -> nn.Parameter:
        """W of the adaptive pivot weight: the last MLP's output layer, [D, hidden] (paper eq. 4)."""
        weight = self.vit.blocks[-1].mlp.fc2.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    @property
    def depth(self) -> int:
        """Number of transformer blocks."""
        return len(self.vit.blocks)

    def forward(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> f [B, D, Y, X], every token with mean 0 and variance 1 over D."""
        tokens_BND = self.vit.forward_features(self._prepare(pixels_01))[:, self.vit.num_prefix_tokens :]
        return tokens_BND.transpose(1, 2).unflatten(2, self.grid)  # type: ignore[no-any-return]

    def intermediates(self, pixels_01: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """After each block in `depths` (0-based): patch tokens [B, N, D] and prefix tokens [B, P, D]."""
        outputs = self.vit.forward_intermediates(
            self._prepare(pixels_01),
            indices=list(depths),
            return_prefix_tokens=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        # A model without class token and registers returns bare patch tokens.
        return [out if isinstance(out, tuple) else (out, out[:, :0]) for out in outputs]

    def check_depths(self, depths: Sequence[int], where: str) -> None:
        """Raises ConfigError unless `depths` are increasing block numbers of this model."""
        if not depths or list(depths) != sorted(set(depths)) or depths[0] < 0 or depths[-1] >= self.depth:
            raise ConfigError(f"{where}: depths {list(depths)} must increase within 0..{self.depth - 1}")

    def _prepare(self, pixels_01: Tensor) -> Tensor:
        size_px = (self.config.input_px, self.config.input_px)
        if pixels_01.shape[-2:] != size_px:
            pixels_01 = F.interpolate(pixels_01, size=size_px, mode="bicubic", align_corners=False)
        return (pixels_01 - self.pixel_mean) / self.pixel_std


def _create(config: RepresentationConfig) -> Any:
    """The timm model, without head and with its last LayerNorm stripped of the affine."""
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": "", **config.overrides}
    try:
        vit = timm.create_model(config.name, pretrained=config.weights == "pretrained", **arguments)
    except OSError as error:
        raise UserError(
            f"weights of '{config.name}' cannot be downloaded ({' '.join(str(error).split())[:120]}); "
            "set representation.weights to a local safetensors file"
        ) from None
    except (RuntimeError, TypeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"timm cannot build '{config.name}' with {config.overrides}: {reason}") from None
    if not isinstance(vit, timm.models.VisionTransformer) or not isinstance(vit.norm, nn.LayerNorm):
        raise ConfigError(f"'{config.name}' is not a plain timm VisionTransformer with a final LayerNorm")
    vit.norm = nn.LayerNorm(vit.embed_dim, eps=vit.norm.eps, elementwise_affine=False)
    return vit
