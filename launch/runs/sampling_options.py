"""Command-line options for sampling images."""

from __future__ import annotations

import argparse
from typing import TypeVar

from base.config import from_dict, to_dict
from base.options import add_options, given_options
from generator.class_conditional.config import ClassSamplingConfig
from generator.sampling_config import DrawingConfig, SamplingConfig

ConfigT = TypeVar("ConfigT", bound=DrawingConfig)
NAMES = {"num_steps": "steps", "text_guidance": "guidance"}


def add_sampling_options(
    parser: argparse.ArgumentParser,
    default: str,
    config: type[SamplingConfig | ClassSamplingConfig] = SamplingConfig,
) -> None:
    """Adds an option for each field of `config` but the time shift; `default`: where unset values come from."""
    group = parser.add_argument_group("sampling", f"default: {default}")
    add_options(group, config, names=NAMES, without=("time_shift",), optional=True)


def read_sampling_options(arguments: argparse.Namespace, base: ConfigT) -> ConfigT:
    """`base` with the values of the command line. Raises ConfigError."""
    return from_dict(type(base), to_dict(base) | given_options(type(base), arguments), where="options")
