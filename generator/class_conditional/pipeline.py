"""Draws images of classes: a generator, its autoencoder and, for AutoGuidance, a weaker generator."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from base.config import UserError
from generator.class_conditional.config import ClassSamplingConfig
from generator.class_conditional.model import ClassGenerator, load_generator
from generator.class_conditional.sampling import sample_class_latents
from generator.pipeline import check_trained_with, decode_uint8, in_bf16
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import ImageAutoencoder, fingerprint
from tokenizer.weights import usable


class ClassPipeline:
    """Generators and their autoencoder. Generators compute in bf16 on a GPU, the autoencoder in fp32."""

    def __init__(
        self,
        generator: ClassGenerator,
        autoencoder: ImageAutoencoder,
        guide: ClassGenerator | None = None,
        *,
        bf16: bool = False,
    ) -> None:
        """`bf16`: whether the generators compute in bf16 on a CPU too."""
        self.generator = generator.eval()
        self.autoencoder = autoencoder.eval()
        self.guide = None if guide is None else guide.eval()
        self._bf16 = bf16

    @classmethod
    def load(
        cls,
        generator: str | Path,
        autoencoder: str | Path,
        guide: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> ClassPipeline:
        """Loads the exports.

        Raises UserError: a missing export, a generator trained on another autoencoder, a guide of other latents
        or classes, no such device.
        """
        place = usable(device)
        model = load_generator(generator)
        expected = model.latents.tokenizer_fingerprint
        check_trained_with(generator, "autoencoder", autoencoder, fingerprint(autoencoder), expected)
        weak = None if guide is None else load_generator(guide)
        if weak is not None:
            if weak.latents != model.latents or weak.config.num_classes != model.config.num_classes:
                raise UserError(
                    f"{guide}: was trained on other latents or classes than {generator}; give an export of the same run"
                )
            weak = weak.to(place)
        return cls(model.to(place), load_autoencoder(autoencoder).to(place), weak)

    @torch.no_grad()
    def draw(self, labels: Sequence[int], seeds: Sequence[int], sampling: ClassSamplingConfig) -> Tensor:
        """Draws uint8 [N, 3, image_px, image_px] on the CPU, one image for each label and seed."""
        device = self.generator.pos_embed.device
        with in_bf16(device, self._bf16):
            latents = sample_class_latents(self.generator, labels, seeds, sampling, self.guide)
        return decode_uint8(self.autoencoder, latents, sampling.batch_images, device)
