"""Fine-tunes text-to-image weights for instruction editing: deepspeed launch/train_edit.py --config FILE"""

import sys

from launch.runs import entry, tasks


def main() -> None:
    """Trains from the config; the default is the paper's run on OmniEdit."""
    tasks.main("edit", __doc__ or "", "configs/generator/edit_omniedit.yaml")


if __name__ == "__main__":
    sys.exit(entry.run(main))
