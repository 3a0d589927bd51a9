"""The generator: text, clean images and noisy images in one packed sequence -> velocities of the noisy ones.

Shape suffixes: T tokens (U understanding, G generation, T = U + G), I images, C latent channels, D width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.packed_batch import PackedBatch
from data.shards import LatentInfo
from engine.config import ConfigError, UserError, from_dict, to_dict
from engine.files import read_json, write_json
from generator.attention import Backend, JointAttention, planned_attention
from generator.embeddings import MAX_PERIOD, LatentEmbedding
from generator.mot import Mot, MotConfig, init_mimetic, init_weights
from generator.qwen import load_qwen
from tokenizer.weights import load_exact, read_tensors, write_tensors

QWEN_PREFIX = "qwen:"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
KIND = "rpiae.generator"


@dataclasses.dataclass(frozen=True)
class GeneratorConfig:
    """Shape and start of the generator."""

    backbone: MotConfig
    """Both experts."""
    max_side: int
    """Largest latent grid side the position table holds, in latent tokens; its rows are y * max_side + x."""
    position_max_period: float = MAX_PERIOD
    """Base of the position table's periods (MAE, Bagel: 10,000). On a small grid a small one tells places apart:
    with 10,000, neighbours of a 4x4 grid differ in a few of the table's columns only.
    """
    init: str = "random"
    """Start of both experts: "random"; "mimetic", random but for attention that looks for its like (small models from
    nothing learn to copy much sooner); or "qwen:" and a Hugging Face name or checkpoint folder.
    """

    def __post_init__(self) -> None:
        if self.position_max_period <= 1:
            raise ConfigError(f"position_max_period is {self.position_max_period}; it must be above 1")
        if self.init not in ("random", "mimetic") and not self.init.startswith(QWEN_PREFIX):
            raise ConfigError(
                f"init '{self.init}': write 'random', 'mimetic' or 'qwen:<Hugging Face name or folder>'"
            )


class Generator(nn.Module):
    """Bagel's generator: latent tokens in, a mixture of transformers, velocities out (no text loss).

    `latents` says what the model was trained on; it travels with the weights. `attention_backend` may be
    forced to one of generator.attention.Kernel; "auto" follows the device.
    """

    def __init__(self, config: GeneratorConfig, latents: LatentInfo) -> None:
        super().__init__()
        channels, height, width = latents.shape
        if max(height, width) > config.max_side:
            raise ConfigError(
                f"max_side {config.max_side} is less than the latent grid {height}x{width}; raise it"
            )
        self.config, self.latents = config, latents
        self.attention_backend: Backend = "auto"
        self.latent_embedding = LatentEmbedding(
            channels, config.backbone.width, config.max_side, config.position_max_period
        )
        self.backbone = Mot(config.backbone)
        self.latent_out = nn.Linear(config.backbone.width, channels)
        for parameter in self.backbone.text_output_parameters():
            parameter.requires_grad_(False)

    @classmethod
    def create(cls, config: GeneratorConfig, latents: LatentInfo, seed: int) -> Generator:
        """On the CPU: random from `seed`, experts as `config.init` says, velocities exactly zero."""
        model = cls._uninitialised(config, latents)
        generator = torch.Generator().manual_seed(seed)
        init_weights(model, generator)
        if config.init == "mimetic":
            init_mimetic(model.backbone, generator)
        with torch.no_grad():
            model.latent_out.weight.zero_()
        if config.init.startswith(QWEN_PREFIX):
            load_qwen(model.backbone, config.init.removeprefix(QWEN_PREFIX))
        return model

    def forward(
        self, batch: PackedBatch, x_GC: Tensor, t_I: Tensor, attention: JointAttention | None = None
    ) -> Tensor:
        """Velocity v = d x_t / dt of every latent token, fp32 [G, C]; that of clean images means nothing.

        `x_GC`: fp32 noisy (or clean) latents in the batch's order. `t_I`: fp32, one time per image, 0 =
        clean. `attention`: another joint attention than the batch's own plan (the sampler's prefix cache).
        """
        x_UD = self.backbone.embed_tokens(batch.text_ids)
        x_GD = self.latent_embedding(x_GC, t_I, batch.image_index, batch.grid_positions)
        if attention is None:
            attention = planned_attention(batch.attention, self.attention_backend)
        _, hidden_GD = self.backbone(x_UD, x_GD, batch.rope_positions, attention)
        velocity_GC: Tensor = self.latent_out(hidden_GD)
        return velocity_GC.float()

    def save(self, directory: Path) -> None:
        """Writes model.safetensors and config.json (shape, latents) into an existing directory."""
        write_tensors(directory / WEIGHTS_NAME, self)
        write_json(
            directory / CONFIG_NAME,
            {"kind": KIND, "generator": to_dict(self.config), "latents": to_dict(self.latents)},
        )

    @classmethod
    def load(cls, directory: str | Path) -> Generator:
        """Reads what `save` wrote, onto the CPU in fp32.

        Raises UserError: no such export, another kind of model, or weights that do not fit (named in one
        line).
        """
        directory = Path(directory)
        path = directory / CONFIG_NAME
        if not path.exists():
            raise UserError(f"{path}: no such file; give the directory of an exported generator")
        tree: dict[str, Any] = read_json(path)
        if tree.get("kind") != KIND:
            raise UserError(f"{path}: this is not an exported generator (kind {tree.get('kind')!r})")
        config = from_dict(GeneratorConfig, tree["generator"], where=str(path))
        model = cls._uninitialised(config, from_dict(LatentInfo, tree["latents"], where=str(path)))
        load_exact(model, read_tensors(directory / WEIGHTS_NAME), where=str(directory))
        return model

    @classmethod
    def _uninitialised(cls, config: GeneratorConfig, latents: LatentInfo) -> Generator:
        """Allocated but not filled, so that no weight is drawn twice or from the global random state."""
        with torch.device("meta"):
            model = cls(config, latents)
        return model.to_empty(device="cpu")


def normalise(z: Tensor, latents: LatentInfo) -> Tensor:
    """(z - mean) / std per channel; `z` [..., C, Y, X], raw as the autoencoder gives it."""
    mean, std = _statistics(z, latents)
    return (z - mean) / std


def unnormalise(z: Tensor, latents: LatentInfo) -> Tensor:
    """The inverse of `normalise`: what the autoencoder decodes."""
    mean, std = _statistics(z, latents)
    return z * std + mean


def _statistics(z: Tensor, latents: LatentInfo) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(latents.mean, dtype=z.dtype, device=z.device)[:, None, None]
    std = torch.tensor(latents.std, dtype=z.dtype, device=z.device)[:, None, None]
    return mean, std
