"""Models of the transformers library as representation models: DINOv2, DINOv3, SigLIP and SigLIP2, MAE.

A model's blocks are called one by one, not through its forward: nothing runs past the last block that is asked
for, and the last norm can be left out.

Shapes: B batch, D width, N patch tokens in row-major order, P prefix tokens (class, then registers), T = P + N,
S input px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from base import hub
from base.config import ConfigError, UserError
from tokenizer import model_names
from tokenizer.backbones import Statistics, Traits, without_affine
from tokenizer.model_names import FieldValue
from tokenizer.norms import replace_norms
from tokenizer.transformers_config import check_against_hub, one_line, vision_config

IMAGENET: tuple[Statistics, Statistics] = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: tuple[Statistics, Statistics] = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def _embed_plainly(vit: Any, x_BCSS: Tensor) -> Tensor:
    tokens_BTD: Tensor = vit.embeddings(x_BCSS)
    return tokens_BTD


def _embed_interpolating(vit: Any, x_BCSS: Tensor) -> Tensor:
    tokens_BTD: Tensor = vit.embeddings(x_BCSS, interpolate_pos_encoding=True)
    return tokens_BTD


def _embed_unmasked(vit: Any, x_BCSS: Tensor) -> Tensor:
    """MAE sorts the patches by noise even when it masks none; rising noise keeps the patches in order."""
    patch_y, patch_x = _pair(vit.config.patch_size)
    num_patches = (x_BCSS.shape[2] // patch_y) * (x_BCSS.shape[3] // patch_x)
    order_BN = torch.arange(num_patches, device=x_BCSS.device).expand(len(x_BCSS), -1)
    tokens_BTD: Tensor = vit.embeddings(x_BCSS, noise=order_BN, interpolate_pos_encoding=True)[0]
    return tokens_BTD


@dataclass(frozen=True)
class Family:
    """Where an architecture keeps its parts. The library itself interpolates position tables."""

    layers: str
    """Path of the list of blocks in the model."""
    norm: str
    """Name of the last LayerNorm."""
    has_class_token: bool
    """Whether a class token comes first."""
    statistics: tuple[Statistics, Statistics]
    """Mean and standard deviation of the pixels that the models were trained with."""
    embed: Callable[[Any, Tensor], Tensor] = _embed_plainly
    """(model, normalised pixels) -> tokens [B, T, D] before the first block."""


FAMILIES = {
    "dinov2": Family("encoder.layer", "layernorm", True, IMAGENET),
    "dinov2_with_registers": Family("encoder.layer", "layernorm", True, IMAGENET),
    "dinov3_vit": Family("model.layer", "norm", True, IMAGENET),
    "siglip_vision_model": Family("encoder.layers", "post_layernorm", False, HALF, _embed_interpolating),
    "vit_mae": Family("layers", "layernorm", True, IMAGENET, _embed_unmasked),
}


@dataclass(frozen=True)
class TransformersBackbone:
    """A vision model of transformers."""

    vit: Any
    """The model as transformers builds it, so that state dicts keep the library's names."""
    family: Family
    """Where the model's parts are."""
    traits: Traits
    """The model's sizes and pixel statistics."""

    @property
    def last_mlp(self) -> nn.Module:
        """The MLP of the last block."""
        mlp = self.blocks[-1].mlp
        assert isinstance(mlp, nn.Module)
        return mlp

    def checkpoint_activations(self) -> None:
        """Turns on transformers' own activation checkpointing, which works only in training mode."""
        self.vit.gradient_checkpointing_enable({"use_reentrant": False})

    def patch_tokens(self, x_BCSS: Tensor) -> Tensor:
        """Normalised pixels -> [B, N, D] after the last norm."""
        tokens_BTD = self._after(x_BCSS, [self.traits.depth - 1])[0]
        normed_BTD: Tensor = getattr(self.vit, self.family.norm)(tokens_BTD)
        return normed_BTD[:, self.traits.num_prefix_tokens :]

    def intermediates(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Tokens after each block in `depths`, before the last norm: patches [B, N, D] and prefix [B, P, D]."""
        num_prefix = self.traits.num_prefix_tokens
        return [(out[:, num_prefix:], out[:, :num_prefix]) for out in self._after(x_BCSS, depths)]

    @property
    def blocks(self) -> nn.ModuleList:
        """transformers' transformer blocks, first to last."""
        layers: nn.ModuleList = self.vit.get_submodule(self.family.layers)
        return layers

    def _after(self, x_BCSS: Tensor, depths: Sequence[int]) -> list[Tensor]:
        """Tokens [B, T, D] after each block in `depths`."""
        tokens_BTD = self.family.embed(self.vit, x_BCSS)
        rope = {}
        if hasattr(self.vit, "rope_embeddings"):  # DINOv3: rotations for the patches, of this grid
            rope["position_embeddings"] = self.vit.rope_embeddings(x_BCSS)
        outputs = []
        for depth, layer in enumerate(self.blocks[: depths[-1] + 1]):
            tokens_BTD = layer(tokens_BTD, attention_mask=None, **rope)
            if depth in depths:
                outputs.append(tokens_BTD)
        return outputs


def build_transformers(
    name: str, *, pretrained: bool, overrides: Mapping[str, FieldValue]
) -> TransformersBackbone:
    """Builds transformers' model of a short name, a hub repository or a folder, without head.

    The architecture of a short name is known here; overrides replace fields of transformers' config. For any other
    name the architecture comes from `overrides.model_type`, or else from the hub or folder.
    Raises UserError: a failed download, an unknown name, an unsupported architecture, a field that the config lacks.
    """
    from transformers import AutoModel  # takes seconds to import: only where it is needed

    known = model_names.find(name)
    source = name if known is None else known.hub
    config = vision_config(name, known, overrides)
    if config.model_type not in FAMILIES:
        raise ConfigError(
            f"'{name}' is a {config.model_type} of transformers, not one of {', '.join(FAMILIES)}"
        )
    try:
        if not pretrained:
            vit = hub.from_config(AutoModel, config, dtype=torch.float32, attn_implementation="sdpa")
        else:
            vit, report = hub.from_pretrained(
                AutoModel,
                source,
                config=config,
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
            )
            if report["missing_keys"]:
                raise ValueError(f"no weights for {', '.join(sorted(report['missing_keys'])[:4])}")
    except OSError as error:
        raise UserError(
            f"weights of '{name}' cannot be downloaded ({one_line(error)}); "
            "set representation.weights to a local safetensors file, or to random"
        ) from None
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError, AssertionError) as error:
        raise ConfigError(
            f"transformers cannot build '{name}' with {dict(overrides)}: {one_line(error)}"
        ) from None
    if known and pretrained:
        check_against_hub(name, known)
    family = FAMILIES[config.model_type]
    setattr(vit, family.norm, without_affine(getattr(vit, family.norm)))
    replace_norms(vit)
    return TransformersBackbone(vit, family, _traits(config, family))


def _traits(config: Any, family: Family) -> Traits:
    mean, std = family.statistics
    num_registers = int(getattr(config, "num_register_tokens", 0))
    return Traits(
        width=int(config.hidden_size),
        depth=int(config.num_hidden_layers),
        patch_px=_pair(config.patch_size),
        num_prefix_tokens=int(family.has_class_token) + num_registers,
        has_class_token=family.has_class_token,
        mean=mean,
        std=std,
    )


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
