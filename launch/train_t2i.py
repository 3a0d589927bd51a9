"""Trains text-to-image on latent shards: deepspeed --num_gpus 8 launch/train_t2i.py --config FILE"""

import sys

from launch.runs import entry, tasks


def main() -> None:
    """Trains from the config; the default is the paper's run on CC12M."""
    tasks.main("t2i", __doc__ or "", "configs/generator/t2i_cc12m.yaml")


if __name__ == "__main__":
    sys.exit(entry.run(main))
