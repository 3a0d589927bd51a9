"""Trains a small stand-in for DINOv2, for machines without a download: quickstart/train_standin.py --config FILE"""

import sys
from dataclasses import dataclass

from base.config import ConfigError
from base.terminal import say
from launch.runs import entry
from launch.runs.configs import PixelRun
from quickstart.config import StandInConfig


@dataclass(frozen=True)
class StandInRun(PixelRun):
    """Training of a small representation model that stands in for DINOv2."""

    standin: StandInConfig

    def __post_init__(self) -> None:
        input_px = self.standin.representation.input_px
        if input_px != self.pixels.image_px:
            raise ConfigError(
                f"pixels.image_px is {self.pixels.image_px}, standin.representation.input_px is {input_px}; make them "
                "equal"
            )


def main() -> None:
    """Reads the config; trains or resumes."""
    arguments = entry.config_parser(__doc__ or "", "configs/quickstart/standin.yaml").parse_args()
    run = entry.read_config(StandInRun, arguments)
    entry.use_torch()
    from launch.runs.training import train_on_pixels
    from launch.sizing import dry_run
    from quickstart.standin import IdentityObjective

    if arguments.dry_run:
        say(dry_run.objective_run(run, IdentityObjective(run.standin)))
        return
    train_on_pixels(run, lambda: IdentityObjective(run.standin))


if __name__ == "__main__":
    sys.exit(entry.run(main))
