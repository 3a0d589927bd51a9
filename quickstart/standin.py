"""A small stand-in for DINOv2, where no pretrained model can be downloaded: a ViT trained to name images.

Shapes: B batch, D feature width, Y X token grid, K classes, H W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base import files
from base.config import UserError, to_dict
from base.objective import LossOutput, WithoutAdversary
from data.samples.images import PixelBatch
from quickstart.config import StandInConfig
from tokenizer.config import CONFIG_NAME, WEIGHTS_NAME
from tokenizer.representation import Representation
from tokenizer.weights import write_tensors


class Classifier(nn.Module):
    """One Linear on the mean of f's patch tokens; another Linear reads each patch's pixels from its token."""

    def __init__(self, config: StandInConfig) -> None:
        super().__init__()
        self.representation = Representation(config.representation)
        self.patch_px = config.representation.input_px // self.representation.grid[0]
        self.head = nn.Linear(self.representation.width, config.num_classes)
        self.pixels = nn.Linear(self.representation.width, 3 * self.patch_px**2)

    def forward(self, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] -> logits [B, K], pixels_01 [B, 3, H, W]; H = W = input_px."""
        f_BDYX: Tensor = self.representation(pixels_01)
        patches = self.pixels(f_BDYX.movedim(1, -1)).movedim(-1, 1)
        return self.head(f_BDYX.mean(dim=(2, 3))), F.pixel_shuffle(patches, self.patch_px)


class IdentityObjective(WithoutAdversary):
    """Cross-entropy on the identity and the error of the patches read back; implements base.objective.Objective.

    The head reads the patch tokens that become f, so that these tokens learn the identities, not a class
    token.
    """

    name = "standin"

    def __init__(self, config: StandInConfig) -> None:
        self.config = config
        # Every layer draws its initial weights from the CPU's generator; its state is restored afterwards.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(config.seed)
            self.model = Classifier(config)

    def to(self, device: torch.device) -> None:
        """Moves the model."""
        self.model.to(device)

    def count(self, batch: PixelBatch) -> int:
        """Images in the micro-batch."""
        return len(batch.sample_ids)

    def loss(self, batch: PixelBatch, step: int) -> LossOutput:
        """Cross-entropy and training accuracy. Raises UserError: a label that is missing or too large."""
        logits, pixels_hat = self.model(batch.pixels_01)
        logits = logits.float()
        labels = torch.tensor([self._label(batch, i) for i in range(len(logits))], device=logits.device)
        cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
        pixel_error = (pixels_hat - batch.pixels_01).abs().mean(dim=(1, 2, 3)).sum()
        loss_sum = cross_entropy + self.config.pixel_weight * pixel_error
        correct = (logits.argmax(dim=1) == labels).sum().float()
        terms = {"cross_entropy": cross_entropy.detach(), "pixel_error": pixel_error.detach()}
        return LossOutput(loss_sum, {**terms, "accuracy": correct})

    def samples(self) -> npt.NDArray[np.uint8] | None:
        """None: a classifier makes no images."""
        return None

    def export(self, directory: Path) -> None:
        """Writes the ViT without its head; representation.weights can name the model.safetensors."""
        write_tensors(directory / WEIGHTS_NAME, self.model.representation.vit)
        files.write_json(directory / CONFIG_NAME, {"representation": to_dict(self.config.representation)})

    def fingerprints(self) -> Mapping[str, str]:
        """Hash of the config, seed and shape included; no weights were loaded."""
        return {"standin": files.digest(to_dict(self.config))}

    def describe(self) -> list[str]:
        """A description of the model, in one line."""
        size = sum(p.numel() for p in self.model.representation.parameters()) / 1e6
        name, classes = self.config.representation.name, self.config.num_classes
        return [
            f"stand-in for DINOv2: {name} ({size:.2f} M parameters) learns to tell {classes} identities apart"
        ]

    def _label(self, batch: PixelBatch, index: int) -> int:
        label = batch.meta[index].get("label")
        if not isinstance(label, int) or not 0 <= label < self.config.num_classes:
            raise UserError(
                f"sample '{batch.sample_ids[index]}': json needs \"label\", an integer below "
                f"{self.config.num_classes}, not {label!r}"
            )
        return label
