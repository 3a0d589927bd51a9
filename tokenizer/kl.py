"""Convolutional VAEs as baselines: SD-VAE, Flux-VAE, VA-VAE (paper, Table 4); diffusers' AutoencoderKL inside.

Shapes: B batch, C latent channels, Y X latent grid, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from base.config import ConfigError, UserError, from_dict
from tokenizer.cnn_decoder import channels_last_on_gpu
from tokenizer.config import CONFIG_NAME, WEIGHTS_NAME, Kind, read_tree
from tokenizer.export import ImageAutoencoder
from tokenizer.weights import load_model, read_tensors


@dataclass(frozen=True)
class KlConfig:
    """Everything that fixes the shapes of a convolutional VAE."""

    image_px: int
    """Side of the square images, in pixels; a multiple of 2^(levels - 1)."""
    latent_channels: int
    """Channels C of the latent."""
    block_channels: tuple[int, ...]
    """Channels of each level, finest first; each level but the last halves the grid."""
    blocks_per_level: int = 2
    """Residual blocks of a level in the encoder; the decoder has one more."""
    norm_groups: int = 32
    """Groups of the group norms; must divide every level's channels."""
    coarsest_attention: bool = False
    """Whether attention follows every block of the coarsest level (VA-VAE: LDM's attention at 16x16)."""
    middle_attention: bool = True
    """Whether attention stands between the two blocks in the middle."""
    quant_conv: bool = True
    """Whether a 1x1 convolution follows the encoder (Flux has none)."""
    post_quant_conv: bool = True
    """Whether a 1x1 convolution precedes the decoder (Flux has none)."""


class KlAutoencoder(ImageAutoencoder):
    """pixels_01 <-> latents: the posterior's mean, raw.

    No scaling_factor and no shift_factor is applied: the shards keep each channel's mean and deviation, with which a
    generator normalises every autoencoder's latents alike. Flux's latents stay [16, H/8, W/8]; the generator does the
    2x2 patching.
    """

    kind: ClassVar[Kind] = "kl"
    config: KlConfig

    def __init__(self, config: KlConfig) -> None:
        super().__init__()
        if config.image_px % self._factor(config):
            raise ConfigError(
                f"image_px is {config.image_px}, no multiple of {self._factor(config)}, which "
                f"{len(config.block_channels)} block_channels divide the image by"
            )
        self.config = config
        self.vae = _build(config)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, Y, X) of one latent."""
        side = self.config.image_px // self._factor(self.config)
        return (self.config.latent_channels, side, side)

    def encode(self, pixels_01: Tensor) -> Tensor:
        """[B, 3, H, W] in [0, 1] -> the posterior's mean z [B, C, Y, X] fp32."""
        return self.encode_moments(pixels_01)[0]

    def encode_moments(self, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 3, H, W] in [0, 1] -> the posterior's mean and log variance in [-30, 20], both [B, C, Y, X] fp32."""
        posterior = self.vae.encode(channels_last_on_gpu(2 * pixels_01 - 1)).latent_dist
        return posterior.mean.float().contiguous(), posterior.logvar.float().contiguous()

    def decode(self, z_BCYX: Tensor) -> Tensor:
        """[B, C, Y, X] -> pixels_01 [B, 3, H, W] fp32, not clamped."""
        pixels: Tensor = self.vae.decode(channels_last_on_gpu(z_BCYX)).sample
        return ((pixels.float() + 1) / 2).contiguous()

    @classmethod
    def load(cls, directory: str | Path) -> KlAutoencoder:
        """Reads what `save` wrote, on the CPU, in evaluation mode.

        Raises UserError: nothing there, another format or kind, parameters that do not fit.
        """
        kind, tree = read_tree(directory)
        if kind != cls.kind:
            raise UserError(f"{directory}: holds an RPiAE or an RAE, not a convolutional VAE")
        path = Path(directory) / CONFIG_NAME
        config, weights = from_dict(KlConfig, tree, where=str(path)), Path(directory) / WEIGHTS_NAME
        return load_model(lambda: cls(config), read_tensors(weights), str(weights), path).eval()

    @staticmethod
    def _factor(config: KlConfig) -> int:
        return 1 << (len(config.block_channels) - 1)


def _build(config: KlConfig) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL  # takes seconds to import

    if any(channels % config.norm_groups for channels in config.block_channels):
        raise ConfigError(
            f"block_channels {list(config.block_channels)} are no multiples of norm_groups {config.norm_groups}"
        )
    plain = len(config.block_channels) - 1
    attention = "Attn" if config.coarsest_attention else ""
    return AutoencoderKL(
        down_block_types=(*["DownEncoderBlock2D"] * plain, f"{attention}DownEncoderBlock2D"),
        up_block_types=(f"{attention}UpDecoderBlock2D", *["UpDecoderBlock2D"] * plain),
        block_out_channels=config.block_channels,
        layers_per_block=config.blocks_per_level,
        latent_channels=config.latent_channels,
        norm_num_groups=config.norm_groups,
        sample_size=config.image_px,
        use_quant_conv=config.quant_conv,
        use_post_quant_conv=config.post_quant_conv,
        mid_block_add_attention=config.middle_attention,
    )
