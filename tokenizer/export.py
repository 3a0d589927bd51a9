"""The interface of every autoencoder, and the folder that an autoencoder is saved in.

The folder holds model.safetensors and config.json: {"format_version", KIND: config, "provenance"}, where KIND
tells which class reads it (tokenizer/autoencoders.py).

Shapes: B batch, C latent channels, Y X latent grid, H W pixels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from base import files
from base.config import UserError, to_dict
from tokenizer.config import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, Kind, read_tree
from tokenizer.weights import write_tensors


class ImageConfig(Protocol):
    """The fields that every autoencoder's config has."""

    @property
    def image_px(self) -> int:
        """Side of the square images, in pixels."""


class ImageAutoencoder(nn.Module, ABC):
    """pixels_01 <-> latents. Encoding to shards, generators, sampling and evaluation need no more than this."""

    kind: ClassVar[Kind]
    config: ImageConfig

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, Y, X) of one latent."""

    @property
    def has_logvar(self) -> bool:
        """Whether z has a posterior; `encode_moments` then gives its log variance."""
        return True

    @abstractmethod
    def encode(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> z [B, C, Y, X], without drawing: the posterior's mean where there is one."""

    @abstractmethod
    def encode_moments(self, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> mean and log variance of the posterior, both [B, C, Y, X] fp32."""

    @abstractmethod
    def decode(self, z_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> pixels_01 [B, 3, H, W] fp32, not clamped."""

    def save(self, directory: str | Path, provenance: Mapping[str, Any] | None = None) -> None:
        """Writes model.safetensors, then config.json with `provenance`, JSON-able facts of its training."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(directory / WEIGHTS_NAME, self)
        tree = {"format_version": FORMAT_VERSION, self.kind: to_dict(self.config)}
        files.write_json(directory / CONFIG_NAME, {**tree, "provenance": dict(provenance or {})})


def fingerprint(directory: str | Path) -> str:
    """Hex digest of config and weights of a saved autoencoder; equal latents need equal fingerprints.

    The config counts as it was written, so that a field which a later version adds changes no fingerprint.
    Where E's first weights came from is left out: the saved weights are what counts.
    """
    kind, config = read_tree(directory)
    if isinstance(config.get("representation"), dict):
        config = {**config, "representation": {**config["representation"], "weights": "random"}}
    weights = Path(directory) / WEIGHTS_NAME
    if not weights.is_file():
        raise UserError(f"{weights}: no such weights file; export the autoencoder again")
    return files.digest({kind: config, "weights": files.sha256(weights)})
