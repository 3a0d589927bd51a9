"""Configs of a class-conditional generator: its shape, training and drawing. This module needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from base.bounds import Count, Weight
from base.config import ConfigError
from generator.config import TimeShift, check_shift
from generator.sampling_config import DrawingConfig, check_interval, check_scale


@dataclass(frozen=True)
class WideHeadConfig:
    """Shape of DiTDH's head: few, wide layers behind the backbone (RAE: 2048 x 2, 16 heads)."""

    width: int = 2048
    """Width of the head's layers."""
    num_layers: int = 2
    """Number of layers."""
    num_heads: int = 16
    """Number of attention heads."""

    def __post_init__(self) -> None:
        _check("head: ", self.width, self.num_layers, self.num_heads)


@dataclass(frozen=True)
class DitConfig:
    """LightningDiT, or with `head` DiTDH. The comments give XL's values (S, B, L: configs/generator/class/parts)."""

    num_classes: int
    """Classes; labels are 0 to num_classes - 1 (ImageNet: 1,000)."""
    width: int
    """Width of the residual stream (1152)."""
    num_layers: int
    """Number of layers (28)."""
    num_heads: int
    """Number of attention heads (16)."""
    patch: int = 1
    """Side of the square of latent positions that makes one token (1)."""
    qk_norm: bool = True
    """RMSNorm over the head dim of queries and keys: LightningDiT uses it, RAE's DiTDH does not."""
    head: WideHeadConfig | None = None
    """DiTDH's head; None: LightningDiT."""

    def __post_init__(self) -> None:
        _check("", self.width, self.num_layers, self.num_heads)
        if self.num_classes < 1 or self.patch < 1:
            raise ConfigError(f"num_classes {self.num_classes} and patch {self.patch} must be at least 1")
        if self.head is not None and self.patch != 1:
            raise ConfigError(f"patch is {self.patch}; a head works on single latent places, set patch: 1")


@dataclass(frozen=True)
class AlignConfig:
    """The layer that is aligned, and the strength. Defaults: REPA's for XL."""

    layer: Count = 8
    """Number of the backbone's blocks before the projection."""
    weight: Weight = 0.5
    """Weight of the negative mean cosine, which is added to the mean squared error of velocities."""
    width: Count = 2048
    """Inner width of the projection, which has three matrices with SiLU between them."""

    def __post_init__(self) -> None:
        if self.layer < 1 or self.width < 1 or not 0 < self.weight < math.inf:
            raise ConfigError(
                f"align: layer {self.layer}, weight {self.weight}, width {self.width}; each must be above 0"
            )


@dataclass(frozen=True)
class ClassFlowConfig:
    """How the generator is trained (its shape is DitConfig)."""

    time_shift: TimeShift = "auto"
    """Shift of the drawn times towards noise; "auto" = sqrt(latent values / 4096)."""
    init_from: str | None = None
    """Directory of an exported or imported class-conditional generator to start from; None = a new model."""
    compile: bool = False
    """torch.compile on every block. Not with engine.zero_stage 3, which takes weights away between uses."""
    activation_checkpointing: bool = False
    """Whether the backward pass recomputes each block: a third more time, activations of one block instead of all."""
    align: AlignConfig | None = None
    """Whether and how an inner layer is also drawn to the clean latents (REPA, RAEv2); None: the paper's loss alone."""

    def __post_init__(self) -> None:
        check_shift(self.time_shift)


@dataclass(frozen=True)
class ClassSamplingConfig(DrawingConfig):
    """How an image of a class is drawn."""

    guidance: float = 1.0
    """Scale s of v_guide + s (v - v_guide): 1 = plain conditional. The guide is this model without the class
    (Ho and Salimans 2022), or a weaker model with the class (AutoGuidance, Karras et al. 2024; the paper: s = 2.05, the
    same run at epoch 20)."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times (1 = noise) above the first and up to the second are guided. At all other times only v is computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("guidance", self.guidance)
        check_interval(self.guidance_interval)


def mlp_width(width: int) -> int:
    """Inner width of the SwiGLU, 8/3 of the width: its three matrices hold as many weights as two of ratio 4."""
    return 8 * width // 3


def _check(where: str, width: int, num_layers: int, num_heads: int) -> None:
    if min(width, num_layers, num_heads) < 1 or width % (4 * num_heads):
        raise ConfigError(
            f"{where}width {width} in {num_heads} heads and {num_layers} layers; give a width that is a multiple of "
            "4 x num_heads (rotary positions on two axes), and at least one layer"
        )
