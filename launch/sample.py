"""Draws images: one prompt or edit, or a file of them on all ranks.

launch/sample.py --run DIR --prompt "a red apple" --out a.png
deepspeed launch/sample.py --run DIR --prompts FILE.txt|FILE.jsonl --out FOLDER   # an image set; a rerun continues
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from PIL import ExifTags, Image

from base.config import UserError
from base.terminal import say
from generator.sampling_config import SamplingConfig
from launch.runs import entry
from launch.runs.drawable import check_edits, prompt_models
from launch.runs.sampling_options import add_sampling_options, read_sampling_options

SIGN = "RPiAE launch/sample.py"
"""The EXIF field Software of images that this command drew and may replace."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def main() -> None:
    """Draws with generator, autoencoder and text tokenizer of a finished run or of launch/export.py's folder."""
    arguments = _parser().parse_args()
    if arguments.prompts is None:
        _image_paths(arguments)  # checked first, because loading the models takes longer
    models, base = prompt_models(Path(arguments.run))
    given = (arguments.prompts, arguments.prompt, arguments.image and arguments.instruction)
    edit_is_whole = (arguments.image is None) == (arguments.instruction is None)
    if not edit_is_whole or sum(value is not None for value in given) != 1:
        raise UserError("give one of --prompt, --prompts, or --image with --instruction")
    if arguments.num_images < 1:
        raise UserError(f"--num-images {arguments.num_images}; give at least 1")
    if arguments.image is not None:
        check_edits(Path(arguments.run))
    sampling = read_sampling_options(arguments, base)
    entry.use_torch()
    if arguments.prompts is None:
        _draw_one(arguments, models, sampling)
    else:
        _draw_file(arguments, models, sampling)


def _draw_one(arguments: argparse.Namespace, models: tuple[Path, str, str], sampling: SamplingConfig) -> None:
    paths = _image_paths(arguments)
    count = len(paths)
    from generator.pipeline import Pipeline
    from launch.runs.team import own_device

    pipeline = Pipeline.load(*models, device=own_device())
    if arguments.prompt is not None:
        images = pipeline.generate([arguments.prompt] * count, sampling=sampling)
    else:
        images = pipeline.edit([arguments.image] * count, [arguments.instruction] * count, sampling=sampling)
    paths[0].parent.mkdir(parents=True, exist_ok=True)
    signed = Image.Exif()
    signed[ExifTags.Base.Software] = SIGN
    for path, image in zip(paths, images, strict=True):
        image.save(path, exif=signed)
        say(path)


def _image_paths(arguments: argparse.Namespace) -> list[Path]:
    """A path for each image. Raises UserError: not an image's name, or a file exists that this command did not draw."""
    out, count = Path(arguments.out or "sample.png"), arguments.num_images
    if out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {out}: give an image file, {', '.join(SUFFIXES)}")
    paths = (
        [out] if count == 1 else [out.with_name(f"{out.stem}-{index}{out.suffix}") for index in range(count)]
    )
    for path in paths:
        _check_image(path)
    return paths


def _check_image(path: Path) -> None:
    """Raises UserError: the file at `path` exists, and this command did not draw it."""
    if not path.exists():
        return
    from data.samples.images import open_image_file

    try:
        if open_image_file(path).getexif().get(ExifTags.Base.Software) == SIGN:
            return
    except (OSError, ValueError):
        pass
    raise UserError(f"--out {path}: exists, and this command did not draw it; remove it or give another file")


def _draw_file(
    arguments: argparse.Namespace, models: tuple[Path, str, str], sampling: SamplingConfig
) -> None:
    from engine import distributed
    from generator.prompt_set import SampledSetConfig, draw_set
    from generator.prompts import read_prompts
    from launch.runs.team import meet

    prompts = Path(arguments.prompts)
    found = read_prompts(prompts)  # before the ranks meet: a mistake is one line, not one a rank
    if any(prompt.images for prompt in found):
        check_edits(Path(arguments.run))
    if arguments.out is None:
        raise UserError("give --out, the folder of the image set")
    out = Path(arguments.out)
    config = SampledSetConfig(prompts, out, *models, sampling, arguments.num_images)
    team, device = meet()
    count = draw_set(dataclasses.replace(config, device=device), team)
    if team.rank == 0:
        say(f"{out}: {count} images")
    distributed.stop()


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--run", required=True, help="run_dir of a finished t2i or edit training, or a folder of export.py")
    add("--prompt", help="what the image should show")
    add("--image", nargs="+", help="image file to edit, or several")
    add("--instruction", help="how to edit it")
    add("--prompts", help="file of prompts and edits, .txt or .jsonl (see generator/prompts.py)")
    add("--out", help="image file to write (default sample.png); with --prompts the folder of the image set")
    add("--num-images", type=int, default=1, help="images of each prompt")
    add_sampling_options(parser, default="the run's preview_sampling")
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
