"""Trains a class-conditional generator on latent shards: deepspeed launch/train_class.py --config FILE"""

import sys

from launch.runs import entry, tasks


def main() -> None:
    """Trains from the config; the default is the paper's LightningDiT-XL, 80 epochs of ImageNet."""
    tasks.main("class", __doc__ or "", "configs/generator/class/rpiae64_80.yaml")


if __name__ == "__main__":
    sys.exit(entry.run(main))
