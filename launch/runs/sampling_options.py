"""Command-line options for sampling images."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar, get_args

from base.config import from_dict, to_dict
from generator.sampling_config import DrawingConfig, Renorm, Solver

ConfigT = TypeVar("ConfigT", bound=DrawingConfig)


def add_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds an option for each field of SamplingConfig but the time shift; `default`: where unset values come from."""
    add = _add_drawing_options(
        parser, default, "seed of the first image; of a file of prompts: of all its seeds"
    )
    add("--guidance", dest="text_guidance", type=float, help="scale of the text")
    add("--source-guidance", type=float, help="scale of the source images when editing")
    add(
        "--renorm", choices=get_args(Renorm), help="shorten guided velocities to the conditional one's length"
    )
    add("--renorm-min", type=float, help="least factor of --renorm")


def add_class_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    """Adds an option for each field of ClassSamplingConfig but the time shift."""
    add = _add_drawing_options(parser, default, "what the seeds of all images derive from")
    add("--guidance", type=float, help="scale; 1: none")


def read_sampling_options(arguments: argparse.Namespace, base: ConfigT) -> ConfigT:
    """`base` with the values of the command line. Raises ConfigError."""
    names = {field.name for field in dataclasses.fields(base)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return from_dict(type(base), {**to_dict(base), **given}, where="options")


def _add_drawing_options(parser: argparse.ArgumentParser, default: str, seed: str) -> Callable[..., Any]:
    add = parser.add_argument_group("sampling", f"default: {default}").add_argument
    add("--steps", dest="num_steps", type=int, help="steps from noise to data")
    add("--solver", choices=get_args(Solver), help="heun: second order, 2 steps - 1 evaluations")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided times, 1 = noise")
    add("--seed", type=int, help=seed)
    add("--batch-images", type=int, help="images drawn together")
    return add
