"""Configs of an autoencoder, as its folder holds them, and of encoding with one. This module needs no torch."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from base import files
from base.bounds import Count, Few, Seed
from base.config import ConfigError, UserError, from_dict
from data.config import StorageConfig
from tokenizer import model_names

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1

Kind = Literal["autoencoder", "kl"]
"""autoencoder: an RPiAE or an RAE (tokenizer/rpiae.py); kl: a convolutional VAE (tokenizer/kl.py)."""
KINDS: tuple[Kind, ...] = ("autoencoder", "kl")

MIN_STD = 1e-6
"""Least `std` that a config may give. Pixels in [0, 1] have 256 steps, so no model's pixels vary less."""


@dataclass(frozen=True)
class RepresentationConfig:
    """The vision transformer, and how images enter it."""

    name: str
    """A short name (tokenizer/model_names.py: dinov2-b-reg, dinov3-l, siglip2-b, mae-b...) or the library's
    own: a timm model, a repository on the Hugging Face hub, a folder that transformers wrote."""
    input_px: int = 0
    """Side of the square the image is resized to (bicubic) before the model; a multiple of the patch size.
    0: the short name's, for 16x16 tokens (224 for patch 14, 256 for patch 16)."""
    weights: str = "pretrained"
    """Initial weights: `pretrained` (the library's download), `random`, or the path of a safetensors file."""
    overrides: dict[str, int | float | bool | str] = field(default_factory=dict)
    """timm: arguments for create_model: img_size, depth, embed_dim, num_heads, dynamic_img_size...
    transformers: fields of the model's config (hidden_size, num_hidden_layers...); with `model_type`, an
    architecture that needs neither short name nor download."""
    mean: tuple[float, float, float] | None = None
    """Per-channel mean of pixels in [0, 1]; None: the one the model was trained with."""
    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation; None: the one the model was trained with."""
    library: Literal["timm", "transformers"] = "timm"
    """The library that builds the model. It decides the names of the weights and how position tables are resampled,
    so an export keeps its library."""
    num_summed_layers: int = 1
    """k: f is the LayerNorm of the sum of the last k blocks' patch tokens. k = 1, the last block alone, is the paper's.
    RAEv2 (arXiv 2605.18324) finds that sums over more blocks reconstruct better. Normalising after the sum is our
    choice: f keeps its scale."""

    def __post_init__(self) -> None:
        if self.input_px == 0:
            known = model_names.find(self.name)
            if known is None:
                hint = model_names.closest(self.name, [])
                raise ConfigError(f"representation '{self.name}' is no short name: give input_px; {hint}")
            object.__setattr__(self, "input_px", known.input_px)
        if self.input_px < 1:
            raise ConfigError(f"input_px is {self.input_px}; give at least 1, or 0 for the short name's")
        if not all(map(math.isfinite, (*(self.mean or ()), *(self.std or ())))):
            raise ConfigError(f"mean {self.mean} and std {self.std} must be finite")
        if self.std is not None and min(self.std) < MIN_STD:
            raise ConfigError(f"std is {self.std}; pixels in [0, 1] need at least {MIN_STD}")
        if self.num_summed_layers < 1:
            raise ConfigError(f"num_summed_layers is {self.num_summed_layers}; give at least 1")


@dataclass(frozen=True)
class BridgeConfig:
    """Size of the Variational Bridge. Its width D is the representation model's."""

    latent_channels: int = 64
    """Channels C of the latent z."""
    decoder_layers: int = 6
    """Transformer layers of VB_d."""
    num_heads: int = 8
    """Attention heads of VB_e and VB_d; must divide the representation model's width."""
    encoder_mlp_ratio: float = 1.0
    """Hidden width of VB_e's MLP over the feature width."""
    decoder_mlp_ratio: float = 4.0
    """Hidden width of VB_d's MLPs over the feature width."""


@dataclass(frozen=True)
class PixelDecoderConfig:
    """Kind and size of the pixel decoder. RAE has three sizes of `vit`, given as width, layers, heads, mlp_width:
    768, 12, 12, 3072 (ViT-B); 1024, 24, 16, 4096 (ViT-L); the defaults (ViT-XL)."""

    width: int = 1152
    """vit: token width; a multiple of 4 (2-D sin-cos positions)."""
    layers: int = 28
    """vit: transformer layers."""
    heads: int = 16
    """vit: attention heads; must divide the width."""
    mlp_width: int = 4096
    """vit: hidden width of the MLPs."""
    patch_px: int = 16
    """Side in pixels of the square that one token becomes; grid * patch_px is the image size."""
    kind: Literal["vit", "cnn"] = "vit"
    """vit: a transformer (RAE, RPiAE); cnn: convolutions as in Stable Diffusion's decoder (ablations)."""
    base_channels: int = 128
    """cnn: channels at the finest level; a multiple of 32 (group norms)."""
    channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    """cnn: channels of each level over base_channels, finest first; each level but the last doubles the grid."""
    blocks_per_level: int = 3
    """cnn: residual blocks of a level (LDM counts one less: num_res_blocks 2)."""

    def __post_init__(self) -> None:
        sizes = ("width", "heads", "mlp_width", "patch_px", "base_channels", "blocks_per_level")
        for name, least in (*((name, 1) for name in sizes), ("layers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least {least}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that fixes the shapes of an RPiAE, or of an RAE (no bridge)."""

    representation: RepresentationConfig
    """The encoder E."""
    decoder: PixelDecoderConfig
    """The pixel decoder D."""
    image_px: int
    """Side of the square images, in pixels: decoder.patch_px times the side of the encoder's token grid."""
    bridge: BridgeConfig | None = None
    """The Variational Bridge; None before the bridge stage (D then reads f itself)."""

    def __post_init__(self) -> None:
        check_rebuildable(self.representation)


@dataclass(frozen=True)
class EncodeConfig:
    """One encoding run."""

    autoencoder: str
    """Directory of an exported or imported autoencoder: RPiAE, RAE or a convolutional VAE."""
    shards: str
    """Directory of finished pixel shards."""
    out: str
    """Directory for the latent shards."""
    text_tokenizer: str | None
    """Name or directory of the text tokenizer that counts the caption tokens for packing; null where the samples have
    class labels and no captions."""
    statistics_from: str | None = None
    """Latent shards whose mean and deviation this data set takes over, so that a model trained on them can be
    fine-tuned. None: mean and deviation are measured on this data set."""
    resize_px: Count | None = None
    """Short side of an image before the crop, pixels; None: the autoencoder's image_px."""
    num_crops: Few = 1
    """Crops of an image: the centre crop, then random ones. A training step reads one view; an edit's source and
    target share their crops."""
    horizontal_flip: bool = False
    """Whether every crop is stored with its mirror image: twice the views. Not for captions that say left and right."""
    seed: Seed = 0
    """Seed of the random crops."""
    logvar: bool = False
    """Store the posterior's log variance beside its mean, for packing.sample_latents: twice the bytes."""
    batch_images: Count = 64
    """Views per forward pass. Part of the run's identity: another batch size may round differently."""
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Dtype of the stored latents; the encoder runs in fp32."""
    num_decode_threads: Few = 4
    """Threads that decode images, per rank; the latents do not depend on it."""
    storage: StorageConfig = field(default_factory=StorageConfig)
    """How shards behind a URL are read."""
    device: str = "cpu"
    """Where the encoder runs, e.g. cpu or cuda."""

    def __post_init__(self) -> None:
        for name in ("batch_images", "num_crops", "num_decode_threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; give at least 1")


def check_rebuildable(config: RepresentationConfig) -> None:
    """Raises ConfigError: a name that sends timm to a folder or repository for the model's shape.

    An export is rebuilt from its config.json alone, and a stranger's config.json must not choose what timm reads.
    """
    if config.library == "timm" and ":" in config.name:
        raise ConfigError(
            f"representation.name '{config.name}': an export is not built from a folder or repository; give timm's "
            "name of the architecture, and the file in representation.weights"
        )


def without_weights(config: RepresentationConfig) -> RepresentationConfig:
    """`config` with random weights, so that nothing is downloaded."""
    return dataclasses.replace(config, weights="random")


def read_config(directory: str | Path) -> AutoencoderConfig:
    """The config of a saved RPiAE or RAE. Raises UserError: no autoencoder there, another format version or kind."""
    kind, tree = read_tree(directory)
    if kind != "autoencoder":
        raise UserError(f"{directory}: holds a convolutional VAE; this needs an RPiAE or an RAE")
    return from_dict(AutoencoderConfig, tree, where=str(Path(directory) / CONFIG_NAME))


def without_download(config: AutoencoderConfig) -> AutoencoderConfig:
    """`config` with random weights for E, for a caller that loads weights or needs only shapes."""
    return dataclasses.replace(config, representation=without_weights(config.representation))


def read_tree(directory: str | Path) -> tuple[Kind, dict[str, Any]]:
    """Kind and config of a saved autoencoder, as config.json states them.

    Raises UserError: no autoencoder in the folder, or another format version.
    """
    path = Path(directory) / CONFIG_NAME
    try:
        tree = files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no autoencoder there; train one (launch/train_tokenizer.py), import one "
            "(launch/import_release.py) or fix the path"
        ) from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; export the autoencoder again") from None
    if isinstance(tree, dict) and tree.get("format_version") == FORMAT_VERSION:
        for kind in KINDS:
            if isinstance(tree.get(kind), dict):
                return kind, tree[kind]
    raise UserError(f"{path}: not an autoencoder of format version {FORMAT_VERSION}")
