"""The representation-pivoted autoencoder: encoder E, Variational Bridge, pixel decoder D, as one saved thing.

Shapes: B batch, D feature width, C latent channels, Y X token grid, H W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine import files
from engine.config import ConfigError, UserError, from_dict, to_dict
from tokenizer.bridge import Bridge, BridgeConfig
from tokenizer.pixel_decoder import PixelDecoder, PixelDecoderConfig
from tokenizer.representation import Representation, RepresentationConfig
from tokenizer.weights import load_exact, read_tensors, write_tensors

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class AutoencoderConfig:
    """Everything that fixes the shapes of an RPiAE."""

    representation: RepresentationConfig
    """The encoder E."""
    decoder: PixelDecoderConfig
    """The pixel decoder D."""
    image_px: int
    """Side of the square images, in pixels; decoder.patch_px times the encoder's token grid."""
    bridge: BridgeConfig | None = None
    """The Variational Bridge; None before the bridge stage (D then reads f itself)."""


class Autoencoder(nn.Module):
    """pixels_01 <-> latents: the bridge's mu, or f without a bridge."""

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
        self.decoder = PixelDecoder(config.decoder, width, grid, self.encoder.mean, self.encoder.std)

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

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, Y, X) of one latent."""
        bridge = self.config.bridge
        return (self.encoder.width if bridge is None else bridge.latent_channels, *self.encoder.grid)

    def features(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> f [B, D, Y, X]."""
        return self.encoder(pixels_01)  # type: ignore[no-any-return]

    def encode(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> z [B, C, Y, X]: the bridge's mu, or f without a bridge."""
        f_BDYX = self.features(pixels_01)
        if self.bridge is None:
            return f_BDYX
        mu_BCYX: Tensor = self.bridge.encoder(f_BDYX)[0]
        return mu_BCYX

    def decode(self, z_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> pixels_01 [B, 3, H, W] fp32, not clamped."""
        f_BDYX = z_BCYX if self.bridge is None else self.bridge.decoder(z_BCYX)
        return self.decoder(f_BDYX)  # type: ignore[no-any-return]

    def save(self, directory: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors, then config.json with `provenance`, JSON-able facts of its training."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS_NAME, self)
        tree = {"format_version": FORMAT_VERSION, "autoencoder": to_dict(self.config)}
        files.write_json(directory / CONFIG_NAME, {**tree, "provenance": dict(provenance or {})})

    @classmethod
    def load(cls, directory: str | Path) -> Autoencoder:
        """Reads what `save` wrote, on the CPU, in evaluation mode.

        Raises UserError: nothing there, another format, parameters that are missing, unexpected or
        mis-shaped.
        """
        model = cls(_without_download(read_config(directory)))
        weights = Path(directory) / WEIGHTS_NAME
        load_exact(model, read_tensors(weights), str(weights))
        return model.eval()


def read_config(directory: str | Path) -> AutoencoderConfig:
    """The config of a saved autoencoder. Raises UserError: none there, or another format version."""
    path = Path(directory) / CONFIG_NAME
    try:
        tree = files.read_json(path)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no autoencoder there; train one (launch/train_tokenizer.py) or fix the path"
        ) from None
    except ValueError:
        raise UserError(f"{path}: not valid JSON; export the autoencoder again") from None
    if (
        not isinstance(tree, dict)
        or tree.get("format_version") != FORMAT_VERSION
        or "autoencoder" not in tree
    ):
        raise UserError(f"{path}: not an autoencoder of format version {FORMAT_VERSION}")
    return from_dict(AutoencoderConfig, tree["autoencoder"], where=str(path))


def fingerprint(directory: str | Path) -> str:
    """Hex digest of config and weights of a saved autoencoder; equal latents need equal fingerprints.

    Where E's first weights came from is left out: the saved weights are what counts.
    """
    config = _without_download(read_config(directory))
    weights = Path(directory) / WEIGHTS_NAME
    if not weights.is_file():
        raise UserError(f"{weights}: no such weights file; export the autoencoder again")
    return files.digest({"autoencoder": to_dict(config), "weights": files.sha256(weights)})


def _without_download(config: AutoencoderConfig) -> AutoencoderConfig:
    """The same shapes, with E's weights left to the caller."""
    representation = dataclasses.replace(config.representation, weights="random")
    return dataclasses.replace(config, representation=representation)
