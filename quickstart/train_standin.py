"""Trains a small stand-in for DINOv2 where that cannot be downloaded: quickstart/train_standin.py --config FILE"""

import sys

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import StandInRun
from launch.runs.training import train_on_pixels
from launch.sizing import dry_run
from quickstart.standin import IdentityObjective


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
