"""The generator: text, clean images and noisy images in one packed sequence -> velocities of the noisy ones.

Shape suffixes: T tokens (U understanding, G generation, T = U + G), I images, C latent channels, D width.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from base.config import ConfigError, UserError, from_dict, to_dict
from base.files import read_object, write_json
from data.packs.packed_batch import PackedBatch
from data.shards import LatentInfo
from generator.attention import JointAttention, attend, choose_backend, planned_attention
from generator.compiling import Compiler
from generator.config import QWEN_PREFIX, Backend, GeneratorConfig
from generator.embeddings import LatentEmbedding
from generator.heads import DdtHead
from generator.mot import Mot, init_mimetic, init_weights
from generator.qwen import load_qwen
from tokenizer.weights import load_model, read_tensors, shapes_only, write_tensors

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
KIND = "rpiae.generator"
LOGIT_ROWS = 2048
"""Text tokens whose logits exist at once: 2048 x 151,936 fp32 are 1.2 GB."""


class TextLoss(nn.Module):
    """Cross entropy of text, summed. It is a separate module because ZeRO-3 gathers the weights that a module's forward
    reads whenever that forward runs, also when checkpointing runs it again in the backward pass."""

    def forward(self, rows_TD: Tensor, ids_T: Tensor, matrix: nn.Embedding | nn.Linear) -> Tensor:
        """Logits are products with rows of `matrix` [V, D], a text embedding or an LM head. Returns nats, fp32."""
        logits = F.linear(rows_TD, matrix.weight.to(rows_TD.dtype))
        return F.cross_entropy(logits.float(), ids_T, reduction="sum")


class Generator(nn.Module):
    """Bagel's generator: latent tokens in, a mixture of transformers, velocities out; with `text_output`, text as well.

    `latents` says what the model was trained on; it is saved with the weights. `attention_backend` may be
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
        self.head: DdtHead | None = None
        if config.head is not None:
            self.head = DdtHead(
                config.head, channels, config.backbone.width, config.max_side, config.position_max_period
            )
        self.latent_out = nn.Linear((config.head or config.backbone).width, channels)
        self.lm_head: nn.Linear | None = None
        if config.text_output and not config.tied_text_output:
            self.lm_head = nn.Linear(config.backbone.width, config.backbone.vocab_size, bias=False)
        self.text_loss = TextLoss()
        self._train_text_output(config.text_output)

    @classmethod
    def create(cls, config: GeneratorConfig, latents: LatentInfo, seed: int) -> Generator:
        """Builds a generator on the CPU, random from `seed`, experts as `config.init` says, velocities exactly zero."""
        model = cls.uninitialised(config, latents)
        generator = torch.Generator().manual_seed(seed)
        init_weights(model, generator)
        if config.init == "mimetic":
            init_mimetic(model.backbone, generator)
        if model.head is not None:
            model.head.reset_modulation()
        with torch.no_grad():
            model.latent_out.weight.zero_()
        if config.init.startswith(QWEN_PREFIX):
            model._take_lm_head(load_qwen(model.backbone, config.init.removeprefix(QWEN_PREFIX)))
        return model

    def compile_layers(self, backend: Compiler = "inductor") -> None:
        """Compiles each layer's work before its attention and after it. Layers and models of one shape share the
        compiled code; copies and exports equal the plain model's."""
        self.backbone.compile_layers(backend)
        if self.head is not None:
            self.head.compile_layers(backend)

    def set_text_output(self, text_output: bool) -> None:
        """Sets whether text is an output: its weights become trainable, or are frozen and the LM head is dropped.

        Raises UserError: a separate LM head is needed, and the model has none.
        """
        if not text_output:
            self.lm_head = None
        elif not self.config.tied_text_output and self.lm_head is None:
            raise UserError(
                "generator.text_output: the weights to start from have no LM head of their own; start from some that "
                "have one, or set generator.tied_text_output: true"
            )
        self.config = dataclasses.replace(self.config, text_output=text_output)
        self._train_text_output(text_output)

    def _train_text_output(self, trained: bool) -> None:
        for parameter in self.backbone.text_output_parameters():
            parameter.requires_grad_(trained)

    @torch.no_grad()
    def _take_lm_head(self, weight: Tensor | None) -> None:
        """`weight`: the checkpoint's LM head, None if it is tied to the text embedding."""
        if not self.config.text_output:
            return  # no output reads it
        tied = weight is None
        if tied != self.config.tied_text_output:
            raise UserError(
                f"{self.config.init}: its LM head is {'the text embedding' if tied else 'a matrix of its own'}; "
                f"set generator.tied_text_output: {str(tied).lower()}"
            )
        if self.lm_head is not None and weight is not None:
            self.lm_head.weight.copy_(weight)

    def forward(
        self, batch: PackedBatch, x_GC: Tensor, t_I: Tensor, attention: JointAttention | None = None
    ) -> Tensor:
        """Velocity v = d x_t / dt of the tokens of noisy images (the last of the pack), fp32 [num_loss_tokens, C].

        `x_GC`: fp32 noisy (or clean) latents in the batch's order. `t_I`: fp32, one time per image, 0 =
        clean. `attention`: another joint attention than the batch's own plan (the sampler's prefix cache).
        """
        _, hidden_GD = self._hidden(batch, x_GC, t_I, attention, text_output=False)
        return self._velocity(batch, x_GC, t_I, hidden_GD)

    def forward_with_text(self, batch: PackedBatch, x_GC: Tensor, t_I: Tensor) -> tuple[Tensor, Tensor]:
        """`forward`'s velocities, and the cross entropy summed over the batch's `text_loss_ids` (nats), fp32."""
        assert self.config.text_output, "the config names no text output"
        hidden_UD, hidden_GD = self._hidden(batch, x_GC, t_I, None, text_output=True)
        assert hidden_UD is not None
        rows = hidden_UD.index_select(0, batch.text_loss_rows)
        loss = (
            rows.new_zeros((), dtype=torch.float32) + 0 * rows.sum()
        )  # ZeRO waits for a gradient of every parameter
        matrix = self.backbone.embed_tokens if self.lm_head is None else self.lm_head
        chunks = (torch.split(whole, LOGIT_ROWS) for whole in (rows, batch.text_loss_ids))
        for few, ids in zip(*chunks, strict=True):
            loss = loss + checkpoint(
                self.text_loss, few, ids, matrix, use_reentrant=False, preserve_rng_state=False
            )
        return self._velocity(batch, x_GC, t_I, hidden_GD), loss

    def _hidden(
        self,
        batch: PackedBatch,
        x_GC: Tensor,
        t_I: Tensor,
        attention: JointAttention | None,
        *,
        text_output: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """The backbone's outputs: for text tokens if `text_output`, and for noisy latents."""
        x_UD = self.backbone.embed_tokens(batch.text_ids)
        x_GD = self.latent_embedding(x_GC, t_I, batch.image_index, batch.grid_positions)
        if attention is None:
            attention = planned_attention(batch.attention, self.attention_backend)
        hidden: tuple[Tensor | None, Tensor] = self.backbone(
            x_UD, x_GD, batch.rope_positions, attention, batch.num_loss_tokens, text_output
        )
        return hidden

    def _velocity(self, batch: PackedBatch, x_GC: Tensor, t_I: Tensor, hidden_TD: Tensor) -> Tensor:
        if self.head is not None:
            first = len(x_GC) - batch.num_loss_tokens

            def attention(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor) -> Tensor:
                kernel = choose_backend(q_TNH.device, q_TNH.dtype, self.attention_backend, q_TNH.shape[2])
                return attend(q_TNH, k_TNH, v_TNH, batch.noisy_attention, kernel)

            hidden_TD = self.head(
                hidden_TD,
                x_GC[first:],
                t_I,
                batch.image_index[first:],
                batch.grid_positions[first:],
                attention,
            )
        velocity_TC: Tensor = self.latent_out(hidden_TD)
        return velocity_TC.float()

    def save(self, directory: Path) -> None:
        """Writes model.safetensors and config.json (shape, latents) into an existing directory."""
        write_tensors(directory / WEIGHTS_NAME, self)
        write_json(
            directory / CONFIG_NAME,
            {"kind": KIND, "generator": to_dict(self.config), "latents": to_dict(self.latents)},
        )

    @classmethod
    def load(cls, directory: str | Path) -> Generator:
        """Loads a folder that `save` wrote, onto the CPU in fp32.

        Raises UserError: no such export, another kind of model, or weights that do not fit (named in one
        line).
        """
        directory = Path(directory)
        path = directory / CONFIG_NAME
        if not path.exists():
            raise UserError(f"{path}: no such file; give the directory of an exported generator")
        tree = read_object(path)
        if tree.get("kind") != KIND:
            raise UserError(f"{path}: this is not an exported generator (kind {tree.get('kind')!r})")
        config = from_dict(GeneratorConfig, tree.get("generator", {}), where=str(path))
        latents = from_dict(LatentInfo, tree.get("latents", {}), where=str(path))
        tensors = read_tensors(directory / WEIGHTS_NAME)
        return load_model(lambda: cls.uninitialised(config, latents), tensors, str(directory), path)

    @classmethod
    def uninitialised(cls, config: GeneratorConfig, latents: LatentInfo) -> Generator:
        """Allocates a generator without filling it: no weight is drawn twice or from the global random state."""
        with shapes_only():
            model = cls(config, latents)
        return model.to_empty(device="cpu")


def normalise(z: Tensor, latents: LatentInfo) -> Tensor:
    """(z - mean) / std per channel; `z` [..., C, Y, X], raw as the autoencoder gives it."""
    mean, std = _statistics(z, latents)
    return (z - mean) / std


def unnormalise(z: Tensor, latents: LatentInfo) -> Tensor:
    """The inverse of `normalise`: raw latents, as the autoencoder decodes them."""
    mean, std = _statistics(z, latents)
    return z * std + mean


def _statistics(z: Tensor, latents: LatentInfo) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(latents.mean, dtype=z.dtype, device=z.device)[:, None, None]
    std = torch.tensor(latents.std, dtype=z.dtype, device=z.device)[:, None, None]
    return mean, std
