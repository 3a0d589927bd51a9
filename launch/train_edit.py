"""Fine-tunes text-to-image weights for instruction editing: deepspeed launch/train_edit.py --config FILE"""

import sys

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import GeneratorRun


def main() -> None:
    """Trains from the config; the default is the paper's run on OmniEdit."""
    arguments = entry.config_parser(__doc__ or "", "configs/generator/edit_omniedit.yaml").parse_args()
    run = entry.read_config(GeneratorRun, arguments).learning("edit")
    entry.use_torch()
    if arguments.dry_run:
        from launch.sizing import dry_run

        say(dry_run.generator_run(run, is_edit=True))
    else:
        from launch.runs.training import train_generator

        train_generator(run)


if __name__ == "__main__":
    sys.exit(entry.run(main))
