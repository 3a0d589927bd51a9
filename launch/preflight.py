"""Estimates what a run will need, before its launch: launch/preflight.py CONFIG --gpus 8 --gpu-memory 80

Starts nothing and downloads nothing; of a tokenizer's earlier stage it reads only config.json. With --execute, under
deepspeed on the machine that will train, runs one real step of every phase on random data and prints the estimate's
error.
"""

from __future__ import annotations

import argparse
import os
import sys

from base.config import ConfigError, names_of
from base.terminal import say
from launch.runs import entry
from launch.runs.tasks import read_run

TITLES = {
    "tokenizer": "a stage of the tokenizer",
    "t2i": "text-to-image",
    "edit": "editing",
    "class": "class-conditional generation",
}


def main() -> None:
    """Prints the tables; with --execute, then runs the phases."""
    arguments = _parser().parse_intermixed_args()
    paths = [*arguments.config, *(word for word in arguments.words if "=" not in word)]
    if not paths:
        raise ConfigError("give a config: FILE or --config FILE")
    if (
        (arguments.gpus is not None and arguments.gpus < 1)
        or arguments.gpu_memory <= 0
        or (arguments.mfu is not None and not 0 < arguments.mfu <= 1)
    ):
        raise ConfigError("--gpus and --gpu-memory must be above 0, --mfu above 0 and at most 1")
    run = read_run(paths, [word for word in arguments.words if "=" in word])
    entry.use_torch()
    from launch.sizing.report import plan_run, report
    from launch.sizing.step_time import NODE_GPUS

    preflight = plan_run(run)
    gpus = arguments.gpus or min(NODE_GPUS, run.data.num_streams)
    if os.environ.get("RANK", "0") == "0":
        say(f"{names_of(paths)}: {TITLES[run.task]}")
        say(report(preflight, num_gpus=gpus, gpu_gib=arguments.gpu_memory, mfu=arguments.mfu))
        sys.stdout.flush()
    if arguments.execute:
        from launch.sizing.measured_step import execute

        execute(preflight, gpu_gib=arguments.gpu_memory)


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__ or "")
    parser.add_argument(
        "words", nargs="*", metavar="CONFIG section.key=value", help="YAML files; fields to change"
    )
    parser.add_argument("--config", action="append", default=[], help="a YAML file, if it is not given alone")
    parser.add_argument(
        "--gpus", type=int, help="that the run will have (default: a node's, at most one for each pack)"
    )
    parser.add_argument("--gpu-memory", type=float, default=80.0, help="of each, in GiB (default 80)")
    parser.add_argument(
        "--mfu",
        type=float,
        help="share of an H100's peak that packs reach, e.g. from a log (default: part by part)",
    )
    parser.add_argument(
        "--execute", action="store_true", help="take one real step of every phase and measure"
    )
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
