"""What a library's vision transformer must offer to be a representation model, and timm's models as such.

Shapes: B batch, D width, N patch tokens in row-major order, P prefix tokens (class, then registers), S input
px.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import timm
from torch import Tensor, nn

from engine import hub
from engine.config import ConfigError, UserError
from tokenizer import model_names
from tokenizer.model_names import FieldValue
from tokenizer.norms import LayerNorm, replace_norms

Statistics = tuple[float, float, float]


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
    """A vision transformer without head, whose last LayerNorm has no affine. Holds no weights but `vit`'s."""

    @property
    def vit(self) -> nn.Module:
        """The library's module, under the library's parameter names."""

    @property
    def traits(self) -> Traits:
        """Its sizes and pixel statistics."""

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""

    @property
    def last_mlp(self) -> nn.Module:
        """The MLP of the last block."""

    def checkpoint_activations(self) -> None:
        """From now on training keeps each block's input only and computes the block again in a backward pass."""

    def patch_tokens(self, x_BCSS: Tensor) -> Tensor:
        """Normalised pixels -> [B, N, D] after the last norm."""

    def intermediates(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """After each block in `depths`, increasing, before the last norm: patches [B, N, D], prefix [B, P, D].

        Blocks after the last of them do not run.
        """


def output_weight(mlp: nn.Module) -> nn.Parameter:
    """The weight of an MLP's output layer: its last Linear, plain or gated (SwiGLU)."""
    weight = [layer for layer in mlp.modules() if isinstance(layer, nn.Linear)][-1].weight
    assert isinstance(weight, nn.Parameter)
    return weight


def without_affine(norm: nn.LayerNorm) -> nn.LayerNorm:
    """The same normalisation with neither weight nor bias."""
    return LayerNorm(norm.normalized_shape, eps=norm.eps, elementwise_affine=False)


@dataclass(frozen=True)
class TimmBackbone:
    """A VisionTransformer (DINOv2, MAE, SigLIP) or an Eva (DINOv3, with 2-D RoPE) of timm."""

    vit: Any
    """The model as timm builds it, so that state dicts keep timm's names."""
    traits: Traits
    """Its sizes and pixel statistics."""

    @property
    def last_mlp(self) -> nn.Module:
        """The MLP of the last block."""
        mlp: nn.Module = self.vit.blocks[-1].mlp
        return mlp

    @property
    def blocks(self) -> nn.ModuleList:
        """timm's."""
        blocks: nn.ModuleList = self.vit.blocks
        return blocks

    def checkpoint_activations(self) -> None:
        """timm's own switch."""
        self.vit.set_grad_checkpointing(True)

    def patch_tokens(self, x_BCSS: Tensor) -> Tensor:
        """Normalised pixels -> [B, N, D] after the last norm."""
        tokens: Tensor = self.vit.forward_features(x_BCSS)[:, self.traits.num_prefix_tokens :]
        return tokens

    def intermediates(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """After each block in `depths`, before the last norm: patches [B, N, D] and prefix [B, P, D]."""
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
    """The timm model without head. A short name gets the position table of `input_px`, resampled by timm.

    Raises UserError: weights that cannot be downloaded, an unknown name, arguments timm refuses, no ViT.
    """
    known = model_names.find(name)
    timm_name = name if known is None else known.timm
    own = {} if known is None else {"img_size": input_px, **known.timm_arguments}
    # global_pool "": no pooling, and SigLIP's attention pooling is not even built.
    arguments: dict[str, Any] = {"num_classes": 0, "global_pool": "", **own, **overrides}
    if pretrained:
        hub.offline_if_unreachable()
    try:
        vit = timm.create_model(timm_name, pretrained=pretrained, **arguments)
    except OSError as error:
        raise UserError(
            f"weights of '{name}' cannot be downloaded ({' '.join(str(error).split())[:120]}); "
            "set representation.weights to a local safetensors file, or to random"
        ) from None
    except (RuntimeError, TypeError, AssertionError) as error:
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
