"""Draws images from a prompt, or edits an image: launch/sample.py --run DIR --prompt "a red apple" --out a.png"""

import argparse
import sys
from pathlib import Path

from engine.config import UserError, from_dict
from engine.files import read_json
from engine.loop import EXPORT
from generator.pipeline import Pipeline
from generator.sampling import SamplingConfig
from launch import entry
from launch.runs import GeneratorRun


def main() -> None:
    """Loads a finished run's export with the autoencoder and text tokenizer it was trained with, and draws."""
    arguments = _parser().parse_args()
    run_dir = Path(arguments.run)
    if not (run_dir / EXPORT).is_dir():
        raise UserError(f"{run_dir}: no {EXPORT} folder; give the run_dir of a finished t2i or edit training")
    run = from_dict(GeneratorRun, read_json(run_dir / "config.json"), where=str(run_dir / "config.json"))
    if run.autoencoder is None:
        raise UserError(f"{run_dir}/config.json: names no autoencoder; set 'autoencoder' in the run's config")
    editing = arguments.image is not None
    if editing != (arguments.instruction is not None) or editing == (arguments.prompt is not None):
        raise UserError("give either --prompt, or --image with --instruction")
    pipeline = Pipeline.load(run_dir / EXPORT, run.autoencoder, run.text_tokenizer)
    sampling = SamplingConfig(
        num_steps=arguments.steps,
        text_guidance=arguments.guidance,
        source_guidance=arguments.source_guidance,
        time_shift=run.flow.time_shift,
        seed=arguments.seed,
    )
    if editing:
        images = pipeline.edit(
            [arguments.image] * arguments.num_images,
            [arguments.instruction] * arguments.num_images,
            sampling=sampling,
        )
    else:
        images = pipeline.generate([arguments.prompt] * arguments.num_images, sampling=sampling)
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        path = out if len(images) == 1 else out.with_name(f"{out.stem}-{index}{out.suffix}")
        image.save(path)
        print(path)


def _parser() -> argparse.ArgumentParser:
    parser = entry.parser(__doc__ or "")
    parser.add_argument(
        "--run", required=True, help="run_dir of a finished text-to-image or editing training"
    )
    parser.add_argument("--prompt", help="what the image should show")
    parser.add_argument("--image", help="image file to edit")
    parser.add_argument("--instruction", help="how to edit it")
    parser.add_argument("--out", default="sample.png", help="image file to write")
    parser.add_argument("--num-images", type=int, default=1)
    parser.add_argument("--steps", type=int, default=50, help="Euler steps")
    parser.add_argument(
        "--guidance", type=float, default=4.0, help="classifier-free guidance scale of the text"
    )
    parser.add_argument(
        "--source-guidance", type=float, default=1.5, help="guidance scale of the source image"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image")
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
