"""Trains a class-conditional generator on latent shards: deepspeed launch/train_class.py --config FILE"""

import sys

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import ClassRun


def main() -> None:
    """Trains from the config; the default is the paper's LightningDiT-XL, 80 epochs of ImageNet."""
    arguments = entry.config_parser(__doc__ or "", "configs/generator/class/rpiae64_80.yaml").parse_args()
    run = entry.read_config(ClassRun, arguments)
    entry.use_torch()
    if arguments.dry_run:
        from launch.sizing import dry_run

        say(dry_run.class_run(run))
    else:
        from launch.runs.training import train_class

        train_class(run)


if __name__ == "__main__":
    sys.exit(entry.run(main))
