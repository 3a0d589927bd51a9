"""Trains one stage of the RPiAE tokenizer: deepspeed launch/train_tokenizer.py --config configs/tokenizer/pivot.yaml"""

import sys

from base.terminal import say
from launch.runs import entry
from launch.runs.configs import TokenizerRun


def main() -> None:
    """Reads the config, builds the stage, trains or resumes it."""
    arguments = entry.config_parser(__doc__ or "", "configs/tokenizer/pivot.yaml").parse_args()
    run = entry.read_config(TokenizerRun, arguments)
    entry.use_torch()
    if arguments.dry_run:
        from launch.sizing import dry_run

        say(dry_run.tokenizer_run(run))
        return
    from launch.runs.training import preview_pixels, train_on_pixels
    from tokenizer.training.stages import build_stage

    train_on_pixels(
        run,
        lambda: build_stage(
            run.stage, preview_pixels(run.preview_shards, run.num_preview_images, run.pixels)
        ),
    )


if __name__ == "__main__":
    sys.exit(entry.run(main))
