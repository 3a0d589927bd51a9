"""How images are drawn, as options of a command line."""

from __future__ import annotations

import argparse
import dataclasses
from typing import get_args

from engine.config import from_dict, to_dict
from generator.guidance import Renorm
from generator.sampling import SamplingConfig
from generator.solvers import Solver


def add_sampling_options(parser: argparse.ArgumentParser, default: str) -> None:
    """An option for each field of SamplingConfig but the time shift; `default` says where the others come from."""
    add = parser.add_argument_group("sampling", f"default: {default}").add_argument
    add("--steps", dest="num_steps", type=int, help="steps from noise to data")
    add("--solver", choices=get_args(Solver), help="heun: second order, 2 steps - 1 evaluations")
    add("--guidance", dest="text_guidance", type=float, help="scale of the text")
    add("--source-guidance", type=float, help="scale of the source images when editing")
    add("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided times, 1 = noise")
    add(
        "--renorm", choices=get_args(Renorm), help="shorten guided velocities to the conditional one's length"
    )
    add("--renorm-min", type=float, help="least factor of --renorm")
    add("--seed", type=int, help="seed of the first image; of a file of prompts: what its seeds derive from")
    add("--batch-images", type=int, help="images drawn together")


def read_sampling_options(arguments: argparse.Namespace, base: SamplingConfig) -> SamplingConfig:
    """`base` with what stands on the command line. Raises ConfigError."""
    names = {field.name for field in dataclasses.fields(SamplingConfig)}
    given = {name: value for name, value in vars(arguments).items() if name in names and value is not None}
    return from_dict(SamplingConfig, {**to_dict(base), **given}, where="options")
