"""Draws images of all classes in turn, on all ranks; a repeated command continues.

deepspeed launch/sample_class.py --run DIR --images 50000 --out SET [--npz FILE]
... --guidance 2.05 --guide DIR/export_step_00025020     # AutoGuidance; without --guide the model without class guides
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from base.files import check_signed
from base.terminal import say
from generator.class_conditional.config import ClassSamplingConfig
from launch.runs import entry
from launch.runs.drawable import class_models
from launch.runs.sampling_options import add_sampling_options, read_sampling_options


def main() -> None:
    """Draws with a finished run's export and its autoencoder."""
    arguments = _parser().parse_args()
    (generator, autoencoder), base = class_models(arguments.run)
    sampling = read_sampling_options(arguments, base)
    entry.use_torch()
    from data.adm_npz import SIGN, write_npz
    from data.image_set import ImageSet
    from engine import distributed
    from generator.class_conditional.class_set import ClassSetConfig, draw_class_set
    from launch.runs.team import meet

    if arguments.npz is not None:
        check_signed(arguments.npz, SIGN)
    config = ClassSetConfig(
        arguments.out, generator, autoencoder, sampling, arguments.images, arguments.guide
    )
    team, device = meet()
    count = draw_class_set(dataclasses.replace(config, device=device), team)
    if team.rank == 0:
        say(f"{config.out}: {count} images")
        if arguments.npz is not None:
            write_npz(ImageSet.open(config.out), arguments.npz)
            say(arguments.npz)
    distributed.stop()


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "--run",
        type=Path,
        required=True,
        help="run_dir of a finished class-conditional training, or a folder of export.py",
    )
    add("--images", type=int, required=True, help="of all classes together; the paper: 50000")
    add("--out", type=Path, required=True, help="folder of the image set")
    add("--npz", type=Path, help="also one file as ADM's evaluation reads it")
    add("--guide", type=Path, help="an early export of the same run, which guides (AutoGuidance)")
    add_sampling_options(parser, default="the run's preview_sampling", config=ClassSamplingConfig)
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
