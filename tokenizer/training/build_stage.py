"""The objective that the training loop runs, built from a StageConfig."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from base.config import ConfigError, UserError, describing
from tokenizer.config import AutoencoderConfig, read_config, without_download, without_weights
from tokenizer.rpiae import Autoencoder
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.objectives import BridgeObjective, DecoderObjective, JointObjective, PivotObjective
from tokenizer.training.stage_config import StageConfig

__all__ = ["StageObjective", "autoencoder_config", "build_stage", "build_untrained"]

OBJECTIVES: dict[str, type[PivotObjective | BridgeObjective | DecoderObjective]] = {
    "pivot": PivotObjective,
    "bridge": BridgeObjective,
    "decoder": DecoderObjective,
    "joint": JointObjective,
}


def build_stage(config: StageConfig, validation_pixels: Tensor | None = None) -> StageObjective:
    """Builds the objective with its initial weights, on the CPU; a function of config and files alone.

    validation_pixels: uint8 [N, 3, H, W] for the sample grids. Raises UserError: no export at `init_from`,
    weights that cannot be read or downloaded, an autoencoder that does not suit the stage.
    """
    # Every layer draws its initial weights from the CPU's generator; its state is restored afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return OBJECTIVES[config.stage](config, _initial_autoencoder(config), validation_pixels)


def build_untrained(
    config: StageConfig,
    validation_pixels: Tensor | None = None,
    *,
    starts_from: AutoencoderConfig | None = None,
) -> StageObjective:
    """Builds the objective with random weights in every network, to be measured without a download.

    starts_from: the config of the export at `init_from`; None: it is read from config.json. Raises UserError where
    `build_stage` does.
    """
    shapes = without_download(autoencoder_config(config, starts_from))
    perceptual = dataclasses.replace(config.perceptual, vgg16_weights="random")
    if perceptual.representation is not None:
        perceptual = dataclasses.replace(
            perceptual, representation=without_weights(perceptual.representation)
        )
    discriminator = config.discriminator
    if discriminator is not None:
        features = without_weights(discriminator.representation)
        discriminator = dataclasses.replace(discriminator, representation=features)
    config = dataclasses.replace(config, perceptual=perceptual, discriminator=discriminator)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        with describing("stage.autoencoder"):
            autoencoder = Autoencoder(shapes)
        return OBJECTIVES[config.stage](config, autoencoder, validation_pixels)


def autoencoder_config(
    config: StageConfig, starts_from: AutoencoderConfig | None = None
) -> AutoencoderConfig:
    """Shapes of the autoencoder that the stage works on, with the bridge it adds. Reads only config.json of an export.

    starts_from: the export's config, if there is no export to read. Raises UserError: no export there, an autoencoder
    that does not suit the stage.
    """
    found = config.autoencoder or starts_from
    if found is None:
        assert config.init_from is not None
        found = read_config(config.init_from)
    where = config.init_from or "autoencoder"
    if config.stage == "pivot" and found.bridge is not None:
        raise ConfigError(
            f"{where}: has a bridge, the pivot stage trains without; remove it, or use stage joint"
        )
    if config.bridge is not None:
        if found.bridge is not None:
            raise UserError(f"{where}: already has a bridge; remove the section 'bridge' to train it further")
        found = dataclasses.replace(found, bridge=config.bridge)
    if config.stage in ("bridge", "joint") and found.bridge is None:
        raise ConfigError(
            f"{where}: has no bridge, which stage {config.stage} trains; add a section 'bridge'"
        )
    if config.stage == "decoder" and found.bridge is None:
        raise UserError(
            f"{where}: has no bridge; give the bridge stage's export (RAE's decoder: stage pivot, train_encoder false)"
        )
    return found


def _initial_autoencoder(config: StageConfig) -> Autoencoder:
    autoencoder_config(config)  # raises UserError before anything is loaded
    if config.autoencoder is not None:
        with describing("stage.autoencoder"):
            return Autoencoder(config.autoencoder)
    assert config.init_from is not None
    model = Autoencoder.load(config.init_from)
    if config.bridge is not None:
        model.add_bridge(config.bridge)
    return model
