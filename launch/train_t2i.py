"""Trains text-to-image on latent shards: deepspeed --num_gpus 8 launch/train_t2i.py --config FILE"""

import sys

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import GeneratorRun


def main() -> None:
    """Trains from the config; the default is the paper's run on CC12M."""
    arguments = entry.config_parser(__doc__ or "", "configs/generator/t2i_cc12m.yaml").parse_args()
    run = entry.read_config(GeneratorRun, arguments).learning("t2i")
    entry.use_torch()
    if arguments.dry_run:
        from launch.sizing import dry_run

        say(dry_run.generator_run(run, is_edit=False))
    else:
        from launch.runs.training import train_generator

        train_generator(run)


if __name__ == "__main__":
    sys.exit(entry.run(main))
