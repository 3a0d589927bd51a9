"""One sample as it is stored: latents in place of its images, and the token counts that packing plans with.

Shapes: V views, M moments (mean, log variance), C latent channels, Y X token grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from base.config import UserError
from data.samples.captions import is_class_sample, read_captions
from data.samples.images import image_parts
from data.samples.layouts import image_roles, is_interleaved, num_split_tokens, read_layout
from data.samples.text import TextTokenizer
from data.shards import Sample


def latent_sample(
    sample: Sample, latents: Iterator[Tensor], text_tokenizer: TextTokenizer | None
) -> tuple[Sample, int, int]:
    """Returns the latent sample, its image tokens, and its longest caption's text tokens.

    A class counts 0 text tokens; num_split_tokens counts those of splits. `latents` gives the next image's values
    [V, M, C, Y, X] in the stored dtype, images in sorted order. Raises UserError naming the sample: neither caption nor
    class, bad splits, a text without a text tokenizer, values that are not finite.
    """
    parts = dict(sample.parts)
    num_image_tokens = tokens_per_image = 0
    for part in image_parts(sample.parts):
        latent = next(latents)
        _check_finite(latent, f"{sample.where}: the latent of '{part}'")
        del parts[part]
        parts[".".join([*part.split(".")[:-1], "latent"])] = (
            latent.contiguous().view(torch.uint8).numpy().tobytes()
        )
        tokens_per_image = math.prod(latent.shape[-2:])
        num_image_tokens += tokens_per_image
    encoded = Sample(sample.key, parts)
    if is_interleaved(image_roles(sample.parts)):
        layout = read_layout(sample)
        return encoded, *num_split_tokens(layout, tokens_per_image, _needed(text_tokenizer, sample))
    return encoded, num_image_tokens, _num_text_tokens(sample, text_tokenizer)


def _check_finite(latent: Tensor, what: str) -> None:
    if bool(latent.isfinite().all()):
        return
    if latent.dtype == torch.float16 and not bool(latent.isnan().any()):
        raise UserError(f"{what} is too large for fp16 (65504); store dtype bf16 or fp32, in another folder")
    raise UserError(f"{what} is not finite; check the autoencoder's training")


def _num_text_tokens(sample: Sample, text_tokenizer: TextTokenizer | None) -> int:
    if is_class_sample(sample):
        return 0
    captions = read_captions(sample)
    text_tokenizer = _needed(text_tokenizer, sample)
    return max(len(text_tokenizer.encode(caption)) for caption in captions)


def _needed(text_tokenizer: TextTokenizer | None, sample: Sample) -> TextTokenizer:
    if text_tokenizer is None:
        raise UserError(f"{sample.where}: has a caption; give text_tokenizer, which counts its tokens")
    return text_tokenizer
