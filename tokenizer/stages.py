"""The tokenizer's stages: from a StageConfig to the objective that the training loop runs."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from engine.config import ConfigError, UserError
from tokenizer.objectives import (
    BridgeObjective,
    DecoderObjective,
    JointObjective,
    PivotObjective,
)
from tokenizer.representation import RepresentationConfig
from tokenizer.rpiae import Autoencoder, AutoencoderConfig
from tokenizer.stage_config import StageConfig
from tokenizer.stage_objective import StageObjective

__all__ = [
    "BridgeObjective",
    "DecoderObjective",
    "JointObjective",
    "PivotObjective",
    "StageConfig",
    "StageObjective",
    "build_stage",
    "build_untrained",
]

OBJECTIVES: dict[str, type[PivotObjective | BridgeObjective | DecoderObjective]] = {
    "pivot": PivotObjective,
    "bridge": BridgeObjective,
    "decoder": DecoderObjective,
    "joint": JointObjective,
}


def build_stage(config: StageConfig, validation_pixels: Tensor | None = None) -> StageObjective:
    """The objective with its initial weights, on the CPU; a function of config and files alone.

    validation_pixels: uint8 [N, 3, H, W] for the sample grids. Raises UserError: no export at `init_from`,
    weights that cannot be had, an autoencoder that does not suit the stage.
    """
    # Every layer draws its initial weights from the CPU's generator: seeded here, put back afterwards.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(config.seed)
        return OBJECTIVES[config.stage](config, _initial_autoencoder(config), validation_pixels)


def build_untrained(
    config: StageConfig, autoencoder: AutoencoderConfig, validation_pixels: Tensor | None = None
) -> StageObjective:
    """The same objective with random weights in every network: to measure, nothing is read or downloaded."""
    perceptual = dataclasses.replace(config.perceptual, vgg16_weights="random")
    if perceptual.representation is not None:
        representation = untrained(perceptual.representation)
        perceptual = dataclasses.replace(perceptual, representation=representation)
    discriminator = config.discriminator
    if discriminator is not None:
        representation = untrained(discriminator.representation)
        discriminator = dataclasses.replace(discriminator, representation=representation)
    config = dataclasses.replace(config, perceptual=perceptual, discriminator=discriminator)
    autoencoder = dataclasses.replace(autoencoder, representation=untrained(autoencoder.representation))
    return OBJECTIVES[config.stage](config, Autoencoder(autoencoder), validation_pixels)


def untrained(representation: RepresentationConfig) -> RepresentationConfig:
    """The same model, not downloaded."""
    return dataclasses.replace(representation, weights="random")


def _initial_autoencoder(config: StageConfig) -> Autoencoder:
    if config.autoencoder is not None:
        model = Autoencoder(config.autoencoder)
    else:
        assert config.init_from is not None
        model = Autoencoder.load(config.init_from)
    where = config.init_from or "autoencoder"
    if config.stage == "pivot" and model.bridge is not None:
        raise ConfigError(
            f"{where}: has a bridge, the pivot stage trains without; remove it, or use stage joint"
        )
    if config.bridge is not None:
        if model.bridge is not None:
            raise UserError(f"{where}: already has a bridge; remove the section 'bridge' to train it further")
        model.add_bridge(config.bridge)
    if config.stage in ("bridge", "joint") and model.bridge is None:
        raise ConfigError(
            f"{where}: has no bridge, which stage {config.stage} trains; add a section 'bridge'"
        )
    return model
