"""Random images, latents, texts and classes, with which a training is measured before its data exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from base.objective import Batch
from data.config import PixelConfig
from data.packs.class_batch import ClassBatch
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.samples.images import PixelBatch
from generator.sampling import Condition

SPECIAL_IDS = 4


class SyntheticText:
    """A text tokenizer that maps bytes into a vocabulary of given size. Implements data.samples.text.TextTokenizer."""

    im_start_id, im_end_id, vision_start_id, vision_end_id = range(SPECIAL_IDS)
    fingerprint = "synthetic"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> list[int]:
        """One id for each byte of `text`."""
        return [SPECIAL_IDS + byte % (self.vocab_size - SPECIAL_IDS) for byte in text.encode()]

    def decode(self, ids: list[int]) -> str:
        """The ids as text, because different bytes may share an id."""
        return " ".join(map(str, ids))


class SyntheticSource:
    """Returns fixed packs at every step, one for each of this rank's streams. Implements base.objective.BatchSource."""

    def __init__(self, batches: Sequence[Batch], num_streams: int) -> None:
        self.num_streams = num_streams
        self._batches = batches

    def next_step(self) -> Sequence[Batch]:
        """This rank's fixed packs."""
        return self._batches

    def state_dict(self) -> dict[str, Any]:
        """A state without content."""
        return {"fingerprint": "synthetic", "streams": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the source has no position."""

    def metrics(self) -> Mapping[str, float]:
        """Ledger of a step: this rank's samples."""
        return {"samples": float(sum(len(batch.sample_ids) for batch in self._batches))}

    def close(self) -> None:
        """Does nothing: the source holds no resources."""


def pixel_pack(config: PixelConfig, seed: int) -> PixelBatch:
    """A pack of noise images."""
    images = pixels(config.images_per_pack, config.image_px, seed)
    names = tuple(f"synthetic-{index}" for index in range(len(images)))
    return PixelBatch(images, names, seed, tuple({} for _ in names))


def pixels(num_images: int, image_px: int, seed: int = 0) -> Tensor:
    """Noise images, uint8 [num_images, 3, image_px, image_px]."""
    shape = (num_images, 3, image_px, image_px)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def latent_pack(
    shape: tuple[int, int, int],
    *,
    num_tokens: int,
    text_tokens: int,
    num_sources: int,
    num_draws: int,
    has_text_loss: bool,
    text: SyntheticText,
    max_side: int,
    seed: int,
) -> PackedBatch:
    """A pack of as many equal samples as fit, without dropout; the last sample's text fills it to `num_tokens`.

    The text is shorter than `text_tokens` if not even one sample would fit.
    """
    generator = torch.Generator().manual_seed(seed)
    sources, targets = (
        [ImageSplit(torch.randn(shape, generator=generator), noisy) for _ in range(count)]
        for noisy, count in ((False, num_sources), (True, num_draws))
    )
    images = (num_sources + num_draws) * (shape[1] * shape[2] + 2)
    text_tokens = max(2, min(text_tokens, num_tokens - images))
    num_samples = max(1, num_tokens // (images + text_tokens))
    lengths = [text_tokens] * num_samples
    lengths[-1] += max(0, num_tokens - num_samples * (images + text_tokens))
    return build_packed_batch(
        [[*sources, TextSplit([0] * length, has_text_loss), *targets] for length in lengths],
        vision_start_id=text.vision_start_id,
        vision_end_id=text.vision_end_id,
        max_side=max_side,
        seed=seed,
        sample_ids=[f"synthetic-{index}" for index in range(num_samples)],
    )


def class_pack(shape: tuple[int, int, int], *, num_images: int, num_classes: int, seed: int) -> ClassBatch:
    """A pack of noise latents, of all classes in turn."""
    latents = torch.randn((num_images, *shape), generator=torch.Generator().manual_seed(seed))
    names = tuple(f"synthetic-{index}" for index in range(num_images))
    return ClassBatch(latents, torch.arange(num_images) % num_classes, names, seed)


def conditions(
    shape: tuple[int, int, int], *, num_images: int, text_tokens: int, num_sources: int
) -> tuple[Condition, ...]:
    """Equal conditions for previews: a text of zeros, and sources of noise."""
    sources = tuple(
        torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in range(num_sources)
    )
    return tuple(Condition((0,) * text_tokens, sources) for _ in range(num_images))
