"""LightningDiT and DiTDH: noisy latents, time and class -> velocities.

LightningDiT (Yao et al. 2025) is one stack of blocks under one condition, time + class. DiTDH (Zheng et al. 2025, RAE)
puts a few wide blocks behind the stack. They read the noisy latents again and are conditioned, token by token, on the
stack's output. Bagel's DDT head (generator/heads.py) follows this idea with another network: its tokens are packed
samples without rotary positions, it has its own time embedding, norms without weights and matrices without biases.
Published weights fit each network only under that network's names.

Parameter names are those of the published checkpoints (RPiAE's and RAE's code), so that these import.

Shape suffixes: B images, T tokens, D backbone width, W head width, C latent channels, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base.config import ConfigError, UserError, from_dict, to_dict
from base.files import read_object, write_json
from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig
from generator.class_conditional.layers import (
    Block,
    ClassEmbedding,
    FinalLayer,
    FourierTime,
    PatchEmbedding,
    Rope,
    init_parts,
    position_table,
    rope_2d,
    unpatchify,
)
from generator.compiling import Compiler, backend_for, whole
from tokenizer.weights import load_model, read_tensors, shapes_only, write_tensors

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
KIND = "rpiae.class_generator"
HEAD_GAIN = 3**-0.5
"""RAE leaves DiTDH's matrices at torch's default, U(-1/sqrt(D), 1/sqrt(D)): Xavier's range over sqrt(3) if square."""


class ClassGenerator(nn.Module):
    """The base of both networks: noisy latents, times and classes in, a stack of blocks, velocities out.

    `latents` says what the model was trained on; it is saved with the weights.
    """

    def __init__(self, config: DitConfig, latents: LatentInfo) -> None:
        super().__init__()
        channels, height, width = latents.shape
        if height % config.patch or width % config.patch:
            raise ConfigError(f"patch {config.patch} does not divide the latent grid {height}x{width}")
        self.config, self.latents = config, latents
        self.activation_checkpointing = False
        self._backend: Compiler | None = None
        self.grid = (height // config.patch, width // config.patch)
        self.t_embedder = FourierTime(config.width)
        self.y_embedder = ClassEmbedding(config.num_classes, config.width)
        num_tokens = self.grid[0] * self.grid[1]
        # A parameter, as in the published code. It is a fixed table, so it is not trained.
        self.pos_embed = nn.Parameter(torch.zeros(1, num_tokens, config.width), requires_grad=False)
        shapes = [(config.width, config.num_heads)] * config.num_layers
        if config.head is not None:
            shapes += [(config.head.width, config.head.num_heads)] * config.head.num_layers
        self.blocks = nn.ModuleList(Block(width, heads, config.qk_norm) for width, heads in shapes)
        self.final_layer = FinalLayer(shapes[-1][0], channels, config.patch)

    def forward(self, x_BCYX: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """v = d x_t / dt, fp32 [B, C, Y, X].

        `x_BCYX`: normalised noisy latents, fp32. `t_B`: fp32, 1 = noise. `labels_B`: int64; `config.num_classes` is "no
        class".
        """
        return self.forward_with_tokens(x_BCYX, t_B, labels_B, 0)[0]

    def forward_with_tokens(
        self, x_BCYX: Tensor, t_B: Tensor, labels_B: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """Returns `forward`'s velocities, and the backbone's tokens [B, T, D] after its first `layer` blocks."""
        time_BD, class_BD = self.t_embedder(t_B), self.y_embedder(labels_B)
        out_BTO, tokens_BTD = self._velocities(x_BCYX, time_BD, class_BD, layer)
        velocity = unpatchify(out_BTO, x_BCYX.shape[1], self.grid, self.config.patch).float()
        return velocity, tokens_BTD

    def _velocities(
        self, x_BCYX: Tensor, time_BD: Tensor, class_BD: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def compile_layers(self, backend: Compiler = "inductor") -> None:
        """Compiles every block as a whole. Blocks of one width share the compiled code, for any number of images."""
        self._backend = backend

    def save(self, directory: Path) -> None:
        """Writes model.safetensors and config.json (shape, latents) into an existing directory."""
        write_tensors(directory / WEIGHTS_NAME, self)
        tree = {"kind": KIND, "generator": to_dict(self.config), "latents": to_dict(self.latents)}
        write_json(directory / CONFIG_NAME, tree)

    def _run(self, blocks: Iterable[nn.Module], num_heads: int, x_BTD: Tensor, condition: Tensor) -> Tensor:
        rope = rope_2d(self.grid, x_BTD.shape[-1] // num_heads, x_BTD.device)
        backend = backend_for(self._backend, x_BTD, condition)
        run = whole(_run_block, backend)
        for block in blocks:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x_BTD = checkpoint(
                    run, block, x_BTD, condition, rope, use_reentrant=False, preserve_rng_state=False
                )
            else:
                x_BTD = run(block, x_BTD, condition, rope)
        return x_BTD


def _run_block(block: nn.Module, x_BTD: Tensor, condition: Tensor, rope: Rope) -> Tensor:
    out: Tensor = block(x_BTD, condition, rope)
    return out


class LightningDit(ClassGenerator):
    """LightningDiT: one stack of blocks under one condition."""

    def __init__(self, config: DitConfig, latents: LatentInfo) -> None:
        super().__init__(config, latents)
        self.x_embedder = PatchEmbedding(latents.shape[0], config.width, config.patch)

    def _velocities(
        self, x_BCYX: Tensor, time_BD: Tensor, class_BD: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        condition_B1D = (time_BD + class_BD)[:, None]
        blocks, num_heads = list(self.blocks), self.config.num_heads
        x_BTD = self.x_embedder(x_BCYX) + self.pos_embed
        tokens_BTD = self._run(blocks[:layer], num_heads, x_BTD, condition_B1D)
        x_BTD = self._run(blocks[layer:], num_heads, tokens_BTD, condition_B1D)
        return self.final_layer(x_BTD, condition_B1D), tokens_BTD


class DitDh(ClassGenerator):
    """DiTDH: the stack, then wide blocks conditioned on the stack's output."""

    def __init__(self, config: DitConfig, latents: LatentInfo) -> None:
        super().__init__(config, latents)
        assert config.head is not None
        self.s_embedder = PatchEmbedding(latents.shape[0], config.width, config.patch)
        self.x_embedder = PatchEmbedding(latents.shape[0], config.head.width, config.patch)
        same = config.width == config.head.width
        self.s_projector = nn.Identity() if same else nn.Linear(config.width, config.head.width)

    def _velocities(
        self, x_BCYX: Tensor, time_BD: Tensor, class_BD: Tensor, layer: int
    ) -> tuple[Tensor, Tensor]:
        """The published network applies SiLU to the condition twice: here, and again inside every block."""
        config, blocks = self.config, list(self.blocks)
        assert config.head is not None
        condition_B1D = F.silu(time_BD + class_BD)[:, None]
        s_BTD = self.s_embedder(x_BCYX) + self.pos_embed
        tokens_BTD = self._run(blocks[:layer], config.num_heads, s_BTD, condition_B1D)
        s_BTD = self._run(blocks[layer : config.num_layers], config.num_heads, tokens_BTD, condition_B1D)
        s_BTW = self.s_projector(F.silu(time_BD[:, None] + s_BTD))
        x_BTW = self.x_embedder(x_BCYX)
        x_BTW = self._run(blocks[config.num_layers :], config.head.num_heads, x_BTW, s_BTW)
        return self.final_layer(x_BTW, s_BTW), tokens_BTD


def new_generator(config: DitConfig, latents: LatentInfo) -> ClassGenerator:
    """The network that `config` describes, on torch's default device, with the weights that torch allocates."""
    return LightningDit(config, latents) if config.head is None else DitDh(config, latents)


def create_generator(config: DitConfig, latents: LatentInfo, seed: int) -> ClassGenerator:
    """Builds a generator on the CPU, random from `seed`, with velocities exactly zero."""
    model = uninitialised(config, latents)
    generator = torch.Generator().manual_seed(seed)
    init_parts(model, generator, gain=1.0 if config.head is None else HEAD_GAIN)
    with torch.no_grad():
        model.pos_embed.copy_(position_table(model.grid, config.width))
    return model


def load_generator(directory: str | Path) -> ClassGenerator:
    """Loads a folder that `save` wrote, onto the CPU in fp32.

    Raises UserError: no such export, another kind of model, or weights that do not fit (named in one line).
    """
    directory = Path(directory)
    path = directory / CONFIG_NAME
    if not path.exists():
        raise UserError(
            f"{path}: no such file; give the directory of an exported class-conditional generator"
        )
    tree = read_object(path)
    if tree.get("kind") != KIND:
        raise UserError(
            f"{path}: this is not an exported class-conditional generator (kind {tree.get('kind')!r})"
        )
    config = from_dict(DitConfig, tree.get("generator", {}), where=str(path))
    latents = from_dict(LatentInfo, tree.get("latents", {}), where=str(path))
    tensors = read_tensors(directory / WEIGHTS_NAME)
    return load_model(lambda: uninitialised(config, latents), tensors, str(directory), path)


def uninitialised(config: DitConfig, latents: LatentInfo) -> ClassGenerator:
    """Allocates a generator without filling it: no weight is drawn twice or from the global random state."""
    with shapes_only():
        model = new_generator(config, latents)
    return model.to_empty(device="cpu")
