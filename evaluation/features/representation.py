"""Features of a representation model: a local stand-in for Inception, and the input of linear probes.

Shapes: B images, H W pixels, D width, N patch tokens, P prefix tokens (class and registers).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from base import files
from base.config import ConfigError, UserError, from_dict
from tokenizer.config import CONFIG_NAME, WEIGHTS_NAME, RepresentationConfig
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder
from tokenizer.weights import freeze, state_hash

Pooling = Literal["mean_patch", "class"]


class RepresentationFeatures:
    """One token of a representation model; implements evaluation.features.interface.FeatureExtractor.

    `mean_patch`: the mean over the patch tokens of f. `class`: the class token, if the model has one. Both tokens come
    after the last LayerNorm without affine. Distances in this space compare only with each other: they are no FID.
    """

    def __init__(
        self, name: str, representation: Representation, pooling: Pooling = "mean_patch", device: str = "cpu"
    ) -> None:
        self.name = name
        self.dim = representation.width
        self._device = torch.device(device)
        self._representation = representation.to(self._device)
        freeze(self._representation)
        self._pooling = pooling
        prepared: dict[str, Any] = {
            "pooling": pooling,
            "input": f"bicubic resize to {representation.config.input_px}, no antialiasing",
            "mean": list(representation.mean),
            "std": list(representation.std),
        }
        self.protocol: Mapping[str, Any] = {
            "network": f"{name} ({representation.config.name})",
            **prepared,
        }
        self.fingerprint = files.digest([prepared, state_hash(representation)])  # not the model's name

    @classmethod
    def load(
        cls, directory: str | Path, pooling: Pooling = "mean_patch", device: str = "cpu"
    ) -> RepresentationFeatures:
        """Loads the encoder of an exported autoencoder, or an encoder exported alone; it is named after its run.

        Raises UserError: no such export, or files that do not fit.
        """
        directory = Path(directory)
        path = directory / CONFIG_NAME
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the export of an autoencoder or of a stand-in")
        tree = files.read_object(path)
        if "representation" in tree:  # an encoder exported alone
            config = from_dict(RepresentationConfig, tree["representation"], where=str(path))
            weights = str(directory / WEIGHTS_NAME)
            representation = Representation(dataclasses.replace(config, weights=weights))
        else:
            representation = Autoencoder.load(directory).encoder
        return cls(directory.resolve().parent.name, representation, pooling, device)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D]."""
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4
        pixels_01 = pixels.to(self._device).float() / 255
        if self._pooling == "mean_patch":
            f_BDYX: Tensor = self._representation(pixels_01)
            return f_BDYX.float().mean(dim=(2, 3)).cpu()
        return last_tokens(self._representation, pixels_01)[0].cpu()


def last_tokens(representation: Representation, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
    """Class token [B, D] and patch tokens [B, N, D] after the last LayerNorm without affine, fp32.

    Raises ConfigError when the model has no class token.
    """
    if not representation.has_class_token:
        raise ConfigError(f"{representation.config.name} has no class token; take the mean of its patches")
    # `Representation` removes the affine of the last norm, and of no other.
    layers = representation.vit.modules()
    (norm,) = (x for x in layers if isinstance(x, nn.LayerNorm) and not x.elementwise_affine)
    ((patches, prefix),) = representation.intermediates(pixels_01, (representation.depth - 1,))
    return norm(prefix[:, 0].float()), norm(patches.float())
