"""Trains one stage of the RPiAE tokenizer: deepspeed launch/train_tokenizer.py --config configs/tokenizer/pivot.yaml"""

import sys

from launch.runs import entry, tasks


def main() -> None:
    """Trains from the config; the default is the paper's stage I on ImageNet."""
    tasks.main("tokenizer", __doc__ or "", "configs/tokenizer/pivot.yaml")


if __name__ == "__main__":
    sys.exit(entry.run(main))
