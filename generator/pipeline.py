"""Prompts -> images, images and instructions -> images: everything a user needs, in five lines.

pipeline = Pipeline.load("runs/t2i/export", "runs/decoder/export", "runs/text_tokenizer")
pipeline.generate(["a red apple on a blue background"])[0].save("apple.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.text import TextTokenizer, load_text_tokenizer
from engine.config import UserError
from generator.model import Generator
from generator.sampling import Condition, SamplingConfig, make_condition, sample_latents
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import ImageAutoencoder, fingerprint

DEFAULT_SAMPLING = SamplingConfig()


class Pipeline:
    """Generator, autoencoder and text tokenizer that belong together."""

    def __init__(
        self, generator: Generator, autoencoder: ImageAutoencoder, text_tokenizer: TextTokenizer
    ) -> None:
        self.generator = generator.eval()
        self.autoencoder = autoencoder.eval()
        self.text_tokenizer = text_tokenizer

    @classmethod
    def load(
        cls,
        generator: str | Path,
        autoencoder: str | Path,
        text_tokenizer: str | Path,
        device: str | torch.device = "cpu",
    ) -> Pipeline:
        """Reads two exports and a text tokenizer (folder, or Qwen's name on Hugging Face).

        Raises UserError: one is missing, or the generator was trained on another autoencoder or text
        tokenizer.
        """
        model, text = Generator.load(generator), load_text_tokenizer(str(text_tokenizer))
        for what, path, found, expected in (
            ("autoencoder", autoencoder, fingerprint(autoencoder), model.latents.tokenizer_fingerprint),
            ("text tokenizer", text_tokenizer, text.fingerprint, model.latents.text_tokenizer_fingerprint),
        ):
            if found != expected:
                raise UserError(
                    f"{path}: {generator} was trained with another {what} "
                    f"({expected[:12]}, not {found[:12]}); give that one"
                )
        return cls(model.to(device), load_autoencoder(autoencoder).to(device), text)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> list[Image.Image]:
        """One RGB image per prompt; image i depends on its prompt and seed alone (default: sampling.seed +
        i).

        Raises UserError: an empty prompt.
        """
        return self._draw(
            [make_condition(self.text_tokenizer, prompt) for prompt in prompts], seeds, sampling
        )

    def edit(
        self,
        images: Sequence[Image.Image | str | Path],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> list[Image.Image]:
        """One RGB image per (image or its file, instruction).

        Raises UserError: an empty instruction, an image that cannot be read or has another size than the
        model's.
        """
        _same_length("instructions", instructions, images)
        pixels = [read_pixels(image, self.autoencoder.config.image_px) for image in images]
        conditions = [
            make_condition(self.text_tokenizer, instruction, self._encode(image))
            for image, instruction in zip(pixels, instructions, strict=True)
        ]
        return self._draw(conditions, seeds, sampling)

    @torch.no_grad()
    def _encode(self, pixels_01: Tensor) -> Tensor:
        device = self.generator.latent_out.weight.device
        return self.autoencoder.encode(pixels_01[None].to(device))[0].cpu()

    @torch.no_grad()
    def _draw(
        self, conditions: Sequence[Condition], seeds: Sequence[int] | None, sampling: SamplingConfig
    ) -> list[Image.Image]:
        if not conditions:
            return []
        if seeds is None:
            seeds = [sampling.seed + index for index in range(len(conditions))]
        _same_length("seeds", seeds, conditions)
        latents = sample_latents(self.generator, conditions, seeds, sampling, self.text_tokenizer)
        images = []
        for part in torch.split(latents, sampling.batch_images):
            pixels_01 = self.autoencoder.decode(part.to(self.generator.latent_out.weight.device))
            pixels = (pixels_01.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()
            images += [Image.fromarray(image.numpy()) for image in pixels]
        return images


def read_pixels(image: Image.Image | str | Path, image_px: int) -> Tensor:
    """pixels_01 float32 [3, image_px, image_px]; transparency is laid on white.

    Raises UserError: no such file, not an image, another size.
    """
    name = "the image" if isinstance(image, Image.Image) else str(image)
    try:
        opened = image if isinstance(image, Image.Image) else Image.open(image)
        rgba = opened.convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{name}: cannot be read as an image ({' '.join(str(error).split())})") from None
    if rgba.size != (image_px, image_px):
        raise UserError(
            f"{name}: {rgba.width}x{rgba.height} px, this model edits {image_px}x{image_px} px; resize it"
        )
    rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return torch.from_numpy(np.array(rgb)).permute(2, 0, 1).float() / 255


def _same_length(what: str, given: Sequence[object], wanted: Sequence[object]) -> None:
    if len(given) != len(wanted):
        raise UserError(f"{len(given)} {what} for {len(wanted)} images; give one for each")
