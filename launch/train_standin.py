"""Trains a small stand-in for DINOv2 where that cannot be downloaded: launch/train_standin.py --config FILE"""

import sys

from engine.terminal import say
from launch import dry_run, entry
from launch.runs import StandInRun
from launch.training import train_on_pixels
from tokenizer.standin import IdentityObjective


def main() -> None:
    """Reads the config, trains or resumes."""
    arguments = entry.config_parser(__doc__ or "", "configs/quickstart/standin.yaml").parse_args()
    run = entry.read_config(StandInRun, arguments)
    if arguments.dry_run:
        say(dry_run.objective_run(run, IdentityObjective(run.standin)))
        return
    train_on_pixels(run, lambda: IdentityObjective(run.standin))


if __name__ == "__main__":
    sys.exit(entry.run(main))
