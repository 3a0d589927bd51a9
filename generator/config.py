"""Configs of the generator and of its training. This module needs no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from base.bounds import Weight
from base.config import ConfigError

VarlenName = Literal["flash4", "flash3", "flash2", "varlen"]
"""A variable-length attention kernel (generator/flash.py)."""
Kernel = Literal["sdpa"] | VarlenName
Backend = Literal["auto", "flash"] | Kernel
"""A kernel; "flash": the first flash-attn that is installed and runs; "auto": "flash", else varlen, else SDPA."""
TimeShift = float | Literal["auto"]
Task = Literal["t2i", "edit"]
QWEN_PREFIX = "qwen:"
MAX_PERIOD = 10_000.0
GENERATOR, AUTOENCODER, TEXT_TOKENIZER = "generator", "autoencoder", "text_tokenizer"
"""Parts of the folder that launch/export.py writes (generator/pretrained.py)."""
SAMPLING = "sampling.json"
"""How the training drew its samples, in that folder."""


def check_shift(shift: TimeShift) -> None:
    """Raises ConfigError unless `shift` is "auto" or a finite number above 0."""
    if shift != "auto" and not 0 < shift < math.inf:
        raise ConfigError(f'time_shift is {shift}; give "auto" or a number above 0 (1: none)')


@dataclass(frozen=True)
class MotConfig:
    """Shape of both experts. The field comments give Qwen2.5-0.5B's value."""

    vocab_size: int
    """Rows of the text embedding, at least the text tokenizer's vocabulary (151,936)."""
    width: int
    """Width of the residual stream (896)."""
    num_layers: int
    """Number of layers (24)."""
    num_heads: int
    """Query heads of each expert (14)."""
    num_kv_heads: int
    """Key/value heads of each expert; divides num_heads (2)."""
    head_dim: int
    """Width of one head; even (64)."""
    mlp_width: int
    """Inner width of the SwiGLU MLP (4864)."""
    rope_theta: float = 1e6
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Epsilon inside every RMSNorm."""
    qkv_bias: bool = True
    """Whether q, k and v have biases, as in Qwen2."""
    qk_norm: bool = True
    """RMSNorm over the head dim of q and k; Qwen2 has none, Bagel adds it."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim {self.head_dim} is odd; rotary positions need an even one")
        if self.width % 4:
            raise ConfigError(f"width {self.width} is not a multiple of 4, as the 2-D positions need")


@dataclass(frozen=True)
class DdtHeadConfig:
    """Shape of the DDT head."""

    width: int = 2048
    """Width of the head's layers."""
    num_layers: int = 2
    """Number of layers."""
    num_heads: int = 16
    """Number of attention heads."""
    norm_eps: float = 1e-6
    """Epsilon inside every RMSNorm."""

    def __post_init__(self) -> None:
        if min(self.width, self.num_layers, self.num_heads) < 1 or self.width % (4 * self.num_heads):
            raise ConfigError(
                f"head: width {self.width} in {self.num_heads} heads and {self.num_layers} layers; give a width that "
                "is a multiple of 4 x num_heads, and at least one layer"
            )

    @property
    def mlp_width(self) -> int:
        """Inner width of the SwiGLU: 8/3 of the width, so that its three matrices weigh as much as two of ratio 4."""
        return 8 * self.width // 3


@dataclass(frozen=True)
class GeneratorConfig:
    """Shape and start of the generator."""

    backbone: MotConfig
    """Shape of both experts."""
    max_side: int
    """Largest latent grid side the position table holds, in latent tokens; its rows are y * max_side + x."""
    position_max_period: float = MAX_PERIOD
    """Base of the position table's periods (MAE, Bagel: 10,000). A small grid needs a small base: with 10,000,
    neighbours of a 4x4 grid differ in only a few columns of the table."""
    head: DdtHeadConfig | None = None
    """A DDT head between the backbone and the velocities; None: a linear map."""
    text_output: bool = False
    """Whether text is an output too, for a text loss. True keeps trainable the weights that only this output reads."""
    tied_text_output: bool = True
    """Whether logits are products with the rows of the text embedding (Qwen2.5 up to 3B, Qwen3 up to 4B); false: with
    a separate matrix (larger Qwens, Bagel), which exists only if text is an output."""
    init: str = "random"
    """Start of both experts: "random"; "mimetic", random except that attention starts by looking for similar tokens
    (small new models then learn to copy much sooner); or "qwen:" and a Hugging Face name or checkpoint folder."""

    def __post_init__(self) -> None:
        if self.position_max_period <= 1:
            raise ConfigError(f"position_max_period is {self.position_max_period}; it must be above 1")
        if self.init not in ("random", "mimetic") and not self.init.startswith(QWEN_PREFIX):
            raise ConfigError(
                f"init '{self.init}': write 'random', 'mimetic' or 'qwen:<Hugging Face name or folder>'"
            )


@dataclass(frozen=True)
class FlowConfig:
    """How the generator is trained (its shape is GeneratorConfig)."""

    time_shift: TimeShift = "auto"
    """Shift of the drawn times towards noise; "auto" = sqrt(latent values / 4096)."""
    init_from: str | None = None
    """Directory of an exported generator to start from (editing starts from text-to-image); None = a new
    model.
    """
    attention_backend: Backend = "auto"
    """Forces one attention kernel; "auto" follows the device."""
    text_loss_weight: Weight = 0.0
    """Weight of the mean cross entropy of text marked for it, beside the mean squared error of velocities (Bagel: 1);
    0 = none. Above it, generator.text_output must be true. Data that mark no text raise an alarm (engine.on_alarm).
    """
    compile: bool = False
    """Whether torch.compile compiles each layer's work before and after its attention: fused norms, rotations and
    SwiGLU, one product for q, k and v and one for gate and up. Not with engine.zero_stage 3, which takes weights
    away between uses."""
    activation_checkpointing: bool = False
    """Whether the backward pass recomputes each layer: about a third more time, activations of one layer instead of
    all."""

    def __post_init__(self) -> None:
        check_shift(self.time_shift)
