"""Exports a run to a folder: launch/export.py --run RUN --out DIR [--checkpoint STEP|latest] [--name OWNER/NAME]

The folder of a generator also holds autoencoder, text tokenizer, sampling defaults and a model card; it suits the hub,
and --run of sample.py, sample_class.py and evaluate.py. The folder of a tokenizer stage holds the autoencoder.
--checkpoint exports the averaged weights of an unfinished training. Nothing is uploaded: the command for it is printed.
"""

import argparse
import re
import sys
from pathlib import Path

from base import files
from base.config import UserError
from base.terminal import say
from launch.runs import entry
from launch.runs.drawable import check_finished
from launch.runs.tasks import RUNS

NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def main() -> None:
    """Writes the folder and reads it back; the folder appears whole or not at all."""
    parser = entry.parser(__doc__ or "")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--run", type=Path, required=True, help="run_dir of a training")
    parser.add_argument(
        "--checkpoint",
        metavar="STEP|latest",
        help="averaged weights of this checkpoint (default: the export)",
    )
    parser.add_argument("--task", choices=RUNS, help="what it was trained for, if its folder does not say")
    parser.add_argument("--name", help="OWNER/NAME it will have on the hub; without it no upload is offered")
    parser.add_argument("--license", default="other", help="the hub's identifier (default: other)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if arguments.name is not None and not NAME.fullmatch(arguments.name):
        raise UserError(f"--name '{arguments.name}': give OWNER/NAME of letters, digits, '.', '_' and '-'")
    files.check_new(out)
    if arguments.checkpoint is None:
        check_finished(arguments.run, "tokenizer, t2i, edit or class-conditional")
    entry.use_torch()
    from launch.runs.export_folder import write

    what = write(arguments, out)
    say(f"{out}: {what}, read back and complete")
    if arguments.name is not None:
        say(f"to upload it:\nhf upload {arguments.name} {out}")


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
