"""Trains the classifier that judges emoji scenes: launch/train_judge.py --config configs/quickstart/judge.yaml"""

import sys

from data.sources.emoji import BACKGROUND_NAMES, OBJECT_NAMES
from engine.terminal import say
from evaluation.judges.emoji import JudgeObjective, SceneClasses
from launch import dry_run, entry
from launch.runs import JudgeRun
from launch.training import train_on_pixels


def main() -> None:
    """Reads the config, trains or resumes."""
    arguments = entry.config_parser(__doc__ or "", "configs/quickstart/judge.yaml").parse_args()
    run = entry.read_config(JudgeRun, arguments)
    classes = SceneClasses(objects=tuple(OBJECT_NAMES), backgrounds=tuple(BACKGROUND_NAMES))
    if arguments.dry_run:
        say(dry_run.objective_run(run, JudgeObjective(run.judge, classes)))
    else:
        train_on_pixels(run, lambda: JudgeObjective(run.judge, classes))


if __name__ == "__main__":
    sys.exit(entry.run(main))
