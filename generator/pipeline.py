"""Draws images from prompts, and edits images by instructions:

pipeline = Pipeline.load("runs/t2i/export", "runs/decoder/export", "runs/text_tokenizer")
pipeline.generate(["a red apple on a blue background"])[0].save("apple.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from base.config import UserError
from data.samples.images import DECODE_ERRORS, fit_image, open_image_file, to_rgb
from data.samples.text import TextTokenizer, load_text_tokenizer
from generator.model import Generator
from generator.sampling import Condition, make_condition, sample_latents
from generator.sampling_config import SamplingConfig
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import ImageAutoencoder, fingerprint
from tokenizer.weights import usable

DEFAULT_SAMPLING = SamplingConfig()
ImageInput = Image.Image | str | Path
"""An image, or its file (PNG, JPEG or WebP)."""


class Pipeline:
    """A generator with its autoencoder and its text tokenizer.

    On a GPU the generator computes in bf16 from fp32 weights, as in training, and the autoencoder in fp32.
    """

    def __init__(
        self,
        generator: Generator,
        autoencoder: ImageAutoencoder,
        text_tokenizer: TextTokenizer,
        *,
        bf16: bool = False,
    ) -> None:
        """`bf16`: whether the generator computes in bf16 on a CPU too."""
        self.generator = generator.eval()
        self.autoencoder = autoencoder.eval()
        self.text_tokenizer = text_tokenizer
        self._bf16 = bf16

    @classmethod
    def load(
        cls,
        generator: str | Path,
        autoencoder: str | Path,
        text_tokenizer: str | Path,
        device: str | torch.device = "cpu",
    ) -> Pipeline:
        """Loads two exports and a text tokenizer (folder, or Qwen's name on Hugging Face).

        Raises UserError: a missing part, a generator trained on another autoencoder or text tokenizer, no such device.
        """
        place = usable(device)
        model, text = Generator.load(generator), load_text_tokenizer(str(text_tokenizer))
        for what, path, found, expected in (
            ("autoencoder", autoencoder, fingerprint(autoencoder), model.latents.tokenizer_fingerprint),
            ("text tokenizer", text_tokenizer, text.fingerprint, model.latents.text_tokenizer_fingerprint),
        ):
            check_trained_with(generator, what, path, found, expected)
        return cls(model.to(place), load_autoencoder(autoencoder).to(place), text)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> list[Image.Image]:
        """One RGB image per prompt; image i depends on its prompt and seed alone (default: sampling.seed + i).

        Raises UserError: an empty prompt.
        """
        return _images(self.draw([self.condition(prompt) for prompt in prompts], seeds, sampling))

    def edit(
        self,
        images: Sequence[ImageInput | Sequence[ImageInput]],
        instructions: Sequence[str],
        *,
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> list[Image.Image]:
        """One RGB image per (image, instruction); a list in place of an image gives several sources.

        Sources are fitted to the model's square as its training data was: the short side is resized to it, the central
        square kept. The result is that square. Raises UserError: an empty instruction, an image that cannot be read.
        """
        _same_length("instructions", instructions, images)
        several = [[given] if isinstance(given, Image.Image | str | Path) else given for given in images]
        conditions = [
            self.condition(instruction, [self.read_pixels(source) for source in sources])
            for sources, instruction in zip(several, instructions, strict=True)
        ]
        return _images(self.draw(conditions, seeds, sampling))

    def read_pixels(self, image: ImageInput) -> Tensor:
        """Reads an image at this model's image size, as `condition` takes it."""
        return read_pixels(image, self.autoencoder.config.image_px)

    @torch.no_grad()
    def condition(self, text: str, sources: Sequence[Tensor] = ()) -> Condition:
        """Encodes a text and `sources` (uint8 [3, image_px, image_px]) for `draw`. Raises UserError: an empty text."""
        # Sources are encoded one by one, so that their latents do not depend on the other sources.
        latents = [self.autoencoder.encode(source[None].to(self._device).float() / 255) for source in sources]
        return make_condition(self.text_tokenizer, text, [latent[0].cpu() for latent in latents])

    @torch.no_grad()
    def draw(
        self,
        conditions: Sequence[Condition],
        seeds: Sequence[int] | None = None,
        sampling: SamplingConfig = DEFAULT_SAMPLING,
    ) -> Tensor:
        """Draws uint8 [N, 3, image_px, image_px] on the CPU. Raises UserError: not one seed for each condition."""
        side = self.autoencoder.config.image_px
        if not conditions:
            return torch.zeros((0, 3, side, side), dtype=torch.uint8)
        if seeds is None:
            seeds = [sampling.seed + index for index in range(len(conditions))]
        _same_length("seeds", seeds, conditions)
        with in_bf16(self._device, self._bf16):
            latents = sample_latents(self.generator, conditions, seeds, sampling, self.text_tokenizer)
        return decode_uint8(self.autoencoder, latents, sampling.batch_images, self._device)

    @property
    def _device(self) -> torch.device:
        return self.generator.latent_out.weight.device


def in_bf16(device: torch.device, always: bool = False) -> torch.autocast:
    """Autocast to bf16: on a GPU, and wherever `always` is set."""
    return torch.autocast(device.type, torch.bfloat16, enabled=always or device.type == "cuda")


def check_trained_with(generator: str | Path, what: str, path: str | Path, found: str, expected: str) -> None:
    """Raises UserError if `path`'s fingerprint `found` is not the one `expected` by the generator."""
    if found != expected:
        raise UserError(
            f"{path}: {generator} was trained with another {what} ({expected[:12]}, not {found[:12]}); give that one"
        )


def decode_uint8(
    autoencoder: ImageAutoencoder, latents: Tensor, batch_images: int, device: torch.device
) -> Tensor:
    """Decodes raw latents [N, C, Y, X] to uint8 [N, 3, image_px, image_px] on the CPU."""
    drawn = []
    for part in torch.split(latents, batch_images):
        pixels_01 = autoencoder.decode(part.to(device))
        drawn.append((pixels_01.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    return torch.cat(drawn)


def read_pixels(image: ImageInput, image_px: int) -> Tensor:
    """Reads uint8 [3, image_px, image_px], upright, with transparency laid on white.

    The short side of another size is resized, and the central square kept (data.samples.images.fit_image).
    Raises UserError: no such file, not an image, an image so long and thin that it cannot be enlarged.
    """
    name = "the image" if isinstance(image, Image.Image) else str(image)
    try:
        opened = image if isinstance(image, Image.Image) else open_image_file(image)
        return fit_image(to_rgb(opened), image_px)
    except DECODE_ERRORS as error:
        raise UserError(f"{name}: cannot be read as an image ({' '.join(str(error).split())})") from None


def _images(pixels: Tensor) -> list[Image.Image]:
    return [Image.fromarray(image.numpy()) for image in pixels.permute(0, 2, 3, 1).contiguous()]


def _same_length(what: str, given: Sequence[object], wanted: Sequence[object]) -> None:
    if len(given) != len(wanted):
        raise UserError(f"{len(given)} {what} for {len(wanted)} images; give one for each")
