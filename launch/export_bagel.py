"""Exports a generator under Bagel's names, for Bagel's code: launch/export_bagel.py --generator DIR --out DIR"""

import sys
from pathlib import Path

from base import files
from base.terminal import say
from launch.runs import entry


def main() -> None:
    """Writes ema.safetensors and llm_config.json, whole or not at all."""
    parser = entry.parser(__doc__ or "")
    parser.add_argument("--generator", type=Path, required=True, help="RUN/export of a generator's training")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    files.check_new(arguments.out)
    entry.use_torch()
    from generator.bagel import export_bagel
    from generator.model import Generator

    model = Generator.load(arguments.generator)
    with files.directory(arguments.out) as temporary:
        export_bagel(model, temporary)
    say(
        f"{arguments.out}: for Bagel's code, with latent_patch_size 1 and max_latent_size {model.config.max_side}"
    )


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
