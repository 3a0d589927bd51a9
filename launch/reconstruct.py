"""Reconstructs a folder of images: launch/reconstruct.py --autoencoder DIR --images DIR --out DIR

Under `deepspeed` all ranks share the work.
"""

import argparse
import sys
from pathlib import Path

from base.config import UserError
from base.terminal import say
from launch.runs import entry


def main() -> None:
    """Writes an image set of originals and results; a repeated command continues. Status 1: unreadable images."""
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--autoencoder", type=Path, required=True, help="export, trained or imported")
    parser.add_argument("--images", type=Path, required=True, help="folder of png, jpg, webp; also below it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the image set")
    parser.add_argument(
        "--save-latents", action="store_true", help="also latents/NAME.npy, float32 [C, Y, X]"
    )
    parser.add_argument("--batch-size", type=int, default=16, help="images per forward pass")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size is {arguments.batch_size}; give at least 1")
    entry.use_torch()
    from data.sources.folder_walk import images_below
    from engine import distributed
    from evaluation.reconstruct import ReconstructConfig, image_names, reconstruct
    from launch.runs.team import meet

    image_names(arguments.images)  # before the ranks meet, so that a mistake is one line and not one a rank
    images_below(arguments.images).tell_others()
    team, device = meet()
    config = ReconstructConfig(
        arguments.autoencoder,
        arguments.images,
        arguments.out,
        save_latents=arguments.save_latents,
        batch_images=arguments.batch_size,
        device=device,
    )
    done = reconstruct(config, team)
    if team.rank == 0:
        say(f"{config.out}: {done.num_images} images, PSNR {done.psnr_db:.2f} dB")
        if done.unreadable:
            say(f"{len(done.unreadable)} files could not be read; they are named above", sys.stderr)
    distributed.stop()
    if done.unreadable:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(entry.run(main))
