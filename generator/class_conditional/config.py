"""Shape of a class-conditional generator."""

from __future__ import annotations

from dataclasses import dataclass

from base.config import ConfigError


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


def mlp_width(width: int) -> int:
    """Inner width of the SwiGLU, 8/3 of the width: its three matrices hold as many weights as two of ratio 4."""
    return 8 * width // 3


def _check(where: str, width: int, num_layers: int, num_heads: int) -> None:
    if min(width, num_layers, num_heads) < 1 or width % (4 * num_heads):
        raise ConfigError(
            f"{where}width {width} in {num_heads} heads and {num_layers} layers; give a width that is a multiple of "
            "4 x num_heads (rotary positions on two axes), and at least one layer"
        )
