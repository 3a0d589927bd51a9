"""The interface of a representation model's vision transformer, and timm's models behind it.

Shapes: B batch, D width, N patch tokens in row-major order, P prefix tokens (class, then registers), S input
px.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import timm
from torch import Tensor, nn

from base import hub
from base.config import ConfigError, UserError
from tokenizer import model_names
from tokenizer.model_names import FieldValue
from tokenizer.norms import LayerNorm, replace_norms

Statistics = tuple[float, float, float]
SIZES = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "reg_tokens", "num_reg_tokens")
FACTORS = ("mlp_ratio", "init_values", "rope_temperature")
SWITCHES = (
    "class_token", "dynamic_img_pad", "dynamic_img_size", "no_embed_class", "pre_norm", "proj_bias", "qk_norm",
    "qkv_bias", "qkv_fused", "rope_rotate_half", "scale_attn_inner", "scale_mlp", "swiglu_mlp", "use_abs_pos_emb",
    "use_rot_pos_emb",
)  # fmt: skip
CHOICES = {"act_layer": ("gelu", "gelu_tanh", "quick_gelu", "relu", "silu"), "pos_embed": ("learn", "none")}
"""SIZES, FACTORS, SWITCHES and CHOICES list all that an override of a timm model may be. timm.create_model takes more,
such as a path of weights, and a stranger's export brings overrides too."""


@dataclass(frozen=True)
class Traits:
    """Facts of a model that nothing changes after it is built."""

    width: int
    """D."""
    depth: int
    """Transformer blocks."""
    patch_px: tuple[int, int]
    """Height and width of a patch."""
    num_prefix_tokens: int
    """P."""
    has_class_token: bool
    """Whether the first prefix token is a class token."""
    mean: Statistics
    """Per-channel mean of pixels in [0, 1] that the model was trained with."""
    std: Statistics
    """Per-channel standard deviation."""


class Backbone(Protocol):
    """A vision transformer without head; its last LayerNorm has no weight and bias. Only `vit` holds weights."""

    @property
    def vit(self) -> nn.Module:
        """The library's module, under the library's parameter names."""

    @property
    def traits(self) -> Traits:
        """The model's sizes and pixel statistics."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""

    @property
    def last_mlp(self) -> nn.Module:
        """The MLP of the last block."""

    def checkpoint_activations(self) -> None:
        """Turns on activation checkpointing: training keeps each block's input and recomputes the block later."""

    def patch_tokens(self, x_BCSS: Tensor) -> Tensor:
        """Normalised pixels -> [B, N, D] after the last norm."""

    def intermediates(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Tokens after each block in `depths` (increasing), before the last norm: patches [B, N, D], prefix [B, P, D].

        Blocks after the last of `depths` do not run.
        """


def output_weight(mlp: nn.Module) -> nn.Parameter:
    """The weight of an MLP's output layer: its last Linear, plain or gated (SwiGLU)."""
    weight = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)][-1].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    """A LayerNorm of `norm`'s shape and eps, without weight and bias."""
    return LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


@dataclass(frozen=True)
class TimmBackbone:
    """A VisionTransformer (DINOv2, MAE, SigLIP) or an Eva (DINOv3, with 2-D RoPE) of timm."""

    vit: Any
    """The model as timm builds it, so that state dicts keep timm's names."""
    traits: Traits
    """The model's sizes and pixel statistics."""

    @property
    def last_mlp(self) -> nn.Module:
        """The MLP of the last block."""
        mlp: nn.Module = self.vit.blocks[-1].mlp
        return mlp

    @property
    def blocks(self) -> nn.ModuleList:
        """timm's transformer blocks, first to last."""
        blocks: nn.ModuleList = self.vit.blocks
        return blocks

    def checkpoint_activations(self) -> None:
        """Turns on timm's own activation checkpointing."""
        self.vit.set_grad_checkpointing(True)

    def patch_tokens(self, x_BCSS: Tensor) -> Tensor:
        """Normalised pixels -> [B, N, D] after the last norm."""
        tokens: Tensor = self.vit.forward_features(x_BCSS)[:, self.traits.num_prefix_tokens :]
        return tokens

    def intermediates(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Tokens after each block in `depths`, before the last norm: patches [B, N, D] and prefix [B, P, D]."""
        has_prefix = self.traits.num_prefix_tokens > 0
        outputs = self.vit.forward_intermediates(
            x_BCSS,
            indices=list(depths),
            return_prefix_tokens=has_prefix,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        return [out if has_prefix else (out, out[:, :0]) for out in outputs]


def build_timm(
    name: str, input_px: int, *, pretrained: bool, overrides: Mapping[str, FieldValue]
) -> TimmBackbone:
    """Builds timm's model without head. For a short name timm resamples the position table to `input_px`.

    Raises UserError: weights that cannot be downloaded, an unknown name, arguments timm refuses, no ViT.
    """
    known = model_names.find(name)
    timm_name = name if known is None else known.timm
    _check_overrides(name, overrides)
    own = {} if known is None else {"img_size": input_px, **known.timm_arguments}
    # global_pool "": no pooling, and SigLIP's attention pooling is not even built.
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": "", **own, **overrides}
    try:
        vit = hub.create_timm(timm_name, pretrained=pretrained, **arguments)
    except OSError as error:
        raise UserError(
            f"weights of '{name}' cannot be downloaded ({' '.join(str(error).split())[:120]}); "
            "set representation.weights to a local safetensors file, or to random"
        ) from None
    except (RuntimeError, TypeError, ValueError, ArithmeticError, LookupError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        names = [*timm.list_models(), *timm.list_models(pretrained=True)]
        hint = "" if timm_name in names else f"; {model_names.closest(name, names)}"
        raise ConfigError(f"timm cannot build '{name}' with {dict(overrides)}: {reason}{hint}") from None
    is_vit = isinstance(vit, timm.models.VisionTransformer | timm.models.Eva)
    if not is_vit or not isinstance(vit.norm, nn.LayerNorm):
        raise ConfigError(f"'{name}' is not a plain timm VisionTransformer or Eva with a final LayerNorm")
    vit.norm = without_affine(vit.norm)
    replace_norms(vit)
    return TimmBackbone(vit, _timm_traits(vit))


def _check_overrides(name: str, overrides: Mapping[str, FieldValue]) -> None:
    for key, value in overrides.items():
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        least = 0 if key.endswith("_tokens") else 1
        if key in SIZES:
            fits, wanted = number >= least and isinstance(value, int), f"an integer of {least} or more"
        elif key in FACTORS:
            fits, wanted = 0 < number < math.inf, "a number above 0"
        elif key in SWITCHES:
            fits, wanted = isinstance(value, bool), "true or false"
        elif key in CHOICES:
            fits, wanted = value in CHOICES[key], f"one of {', '.join(CHOICES[key])}"
        else:
            known = ", ".join(sorted((*SIZES, *FACTORS, *SWITCHES, *CHOICES)))
            raise ConfigError(f"'{name}': overrides.{key} is no field to set; it has {known}")
        if not fits:
            raise ConfigError(f"'{name}': overrides.{key} is {value!r}; give {wanted}")


def _timm_traits(vit: Any) -> Traits:
    patch_y, patch_x = vit.patch_embed.patch_size
    return Traits(
        width=int(vit.embed_dim),
        depth=len(vit.blocks),
        patch_px=(int(patch_y), int(patch_x)),
        num_prefix_tokens=int(vit.num_prefix_tokens),
        has_class_token=vit.cls_token is not None,
        mean=_statistics(vit.pretrained_cfg["mean"]),
        std=_statistics(vit.pretrained_cfg["std"]),
    )


def _statistics(values: Sequence[float]) -> Statistics:
    red, green, blue = values
    return float(red), float(green), float(blue)
