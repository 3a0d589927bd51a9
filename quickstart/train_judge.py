"""Trains the classifier that judges emoji scenes: quickstart/train_judge.py --config configs/quickstart/judge.yaml"""

import sys
from dataclasses import dataclass

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import PixelRun
from quickstart.config import JudgeConfig


@dataclass(frozen=True)
class JudgeRun(PixelRun):
    """Training of the judge, a classifier."""

    judge: JudgeConfig


def main() -> None:
    """Reads the config; trains or resumes."""
    arguments = entry.config_parser(__doc__ or "", "configs/quickstart/judge.yaml").parse_args()
    run = entry.read_config(JudgeRun, arguments)
    entry.use_torch()
    from launch.runs.training import train_on_pixels
    from launch.sizing import dry_run
    from quickstart.judge import JudgeObjective
    from quickstart.judge_network import SceneClasses
    from quickstart.pictures.scenes import BACKGROUND_NAMES, OBJECT_NAMES

    classes = SceneClasses(objects=tuple(OBJECT_NAMES), backgrounds=tuple(BACKGROUND_NAMES))
    if arguments.dry_run:
        say(dry_run.objective_run(run, JudgeObjective(run.judge, classes)))
    else:
        train_on_pixels(run, lambda: JudgeObjective(run.judge, classes))


if __name__ == "__main__":
    sys.exit(entry.run(main))
