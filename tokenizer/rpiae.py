"""The representation-pivoted autoencoder (RPiAE): encoder E, Variational Bridge and pixel decoder D as one module.

Shapes: B batch, D feature width, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from base.config import ConfigError, UserError, from_dict
from tokenizer.bridge import Bridge, BridgeConfig
from tokenizer.cnn_decoder import CnnDecoder
from tokenizer.export import CONFIG_NAME, WEIGHTS_NAME, ImageAutoencoder, Kind, read_tree
from tokenizer.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tokenizer.representation import (
    Representation,
    RepresentationConfig,
    check_rebuildable,
    without_weights,
)
from tokenizer.weights import load_model, read_tensors

__all__ = [
    "CONFIG_NAME",
    "WEIGHTS_NAME",
    "Autoencoder",
    "AutoencoderConfig",
    "read_config",
    "without_download",
]


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


class Autoencoder(ImageAutoencoder):
    """pixels_01 <-> latents: the bridge's mu, or f without a bridge."""

    kind: ClassVar[Kind] = "autoencoder"
    config: AutoencoderConfig

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Representation(config.representation)
        width, grid = self.encoder.width, self.encoder.grid
        side_px = tuple(side * config.decoder.patch_px for side in grid)
        if side_px != (config.image_px, config.image_px):
            raise ConfigError(
                f"image_px is {config.image_px}, but {grid[0]}x{grid[1]} tokens of decoder.patch_px "
                f"{config.decoder.patch_px} give {side_px[0]}x{side_px[1]}; change one of them"
            )
        self.bridge: Bridge | None = None
        if config.bridge is not None:
            self.add_bridge(config.bridge)
        decoder_class = PixelDecoder if config.decoder.kind == "vit" else CnnDecoder
        self.decoder = decoder_class(config.decoder, width, grid, self.encoder.mean, self.encoder.std)

    def add_bridge(self, bridge: BridgeConfig) -> None:
        """Puts a new, untrained bridge between encoder and decoder (the start of the bridge stage)."""
        assert self.bridge is None
        width = self.encoder.width
        if width % bridge.num_heads:
            raise ConfigError(
                f"bridge.num_heads {bridge.num_heads} does not divide the feature width {width}"
            )
        self.config = dataclasses.replace(self.config, bridge=bridge)
        self.bridge = Bridge(bridge, width)

    def checkpoint_activations(self) -> None:
        """Activation checkpointing in every part: training keeps each layer's input and recomputes its activations."""
        self.encoder.checkpoint_activations()
        self.decoder.activation_checkpointing = True
        if self.bridge is not None:
            self.bridge.decoder.activation_checkpointing = True

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, Y, X) of one latent."""
        bridge = self.config.bridge
        return (self.encoder.width if bridge is None else bridge.latent_channels, *self.encoder.grid)

    @property
    def has_logvar(self) -> bool:
        """Whether the autoencoder has a bridge: its posterior has a log variance."""
        return self.config.bridge is not None

    def features(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> f [B, D, Y, X]."""
        return self.encoder(pixels_01)  # type: ignore[no-any-return]

    def encode(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> z [B, C, Y, X]: the bridge's mu, or f without a bridge."""
        return self.features(pixels_01) if self.bridge is None else self.encode_moments(pixels_01)[0]

    def encode_moments(self, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> the bridge's mu and logvar, both [B, C, Y, X] fp32; an RAE has none."""
        assert self.bridge is not None
        moments: tuple[Tensor, Tensor] = self.bridge.encoder(self.features(pixels_01))
        return moments

    def decode(self, z_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> pixels_01 [B, 3, H, W] fp32, not clamped."""
        f_BDYX = z_BCYX if self.bridge is None else self.bridge.decoder(z_BCYX)
        return self.decoder(f_BDYX)  # type: ignore[no-any-return]

    @classmethod
    def load(cls, directory: str | Path) -> Autoencoder:
        """Loads a folder that `save` wrote, on the CPU, in evaluation mode.

        Raises UserError: no autoencoder in the folder, another format version, parameters that are missing, unexpected
        or mis-shaped.
        """
        config, weights = without_download(read_config(directory)), Path(directory) / WEIGHTS_NAME
        tensors = read_tensors(weights)
        return load_model(lambda: cls(config), tensors, str(weights), Path(directory) / CONFIG_NAME).eval()


def read_config(directory: str | Path) -> AutoencoderConfig:
    """The config of a saved RPiAE or RAE. Raises UserError: no autoencoder there, another format version or kind."""
    kind, tree = read_tree(directory)
    if kind != Autoencoder.kind:
        raise UserError(f"{directory}: holds a convolutional VAE; this needs an RPiAE or an RAE")
    return from_dict(AutoencoderConfig, tree, where=str(Path(directory) / CONFIG_NAME))


def without_download(config: AutoencoderConfig) -> AutoencoderConfig:
    """`config` with random weights for E, for a caller that loads weights or needs only shapes."""
    return dataclasses.replace(config, representation=without_weights(config.representation))
