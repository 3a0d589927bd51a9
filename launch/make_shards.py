"""Makes shards of images from a source, or checks shards: launch/make_shards.py COMMAND --help

A repeated command continues where it stopped. The shards' bytes do not depend on the number of processes or nodes.
"""

import argparse
import sys
from pathlib import Path

from base import files
from base.config import UserError
from base.options import read_options
from base.terminal import say
from base.threads import num_cores
from launch.runs import entry, shard_sources


def main() -> None:
    """Runs one command."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shard_sources.add_commands(commands)
    check = commands.add_parser("verify", help="recount everything: checksums, counts, json")
    check.set_defaults(run=_verify)
    look = commands.add_parser(
        "doctor", help="verify, look into every sample, and say whether a launch would work"
    )
    look.set_defaults(run=_doctor)
    for command in (check, look):
        command.add_argument("shards", type=Path)
        command.add_argument("--processes", type=int, default=num_cores())
    look.add_argument("--ranks", type=int, default=1, help="GPUs of the launch")
    look.add_argument("--streams", type=int, default=8, help="data.num_streams of the launch")
    look.add_argument("--tokens-per-pack", type=int, help="of latents: packing.tokens_per_pack")
    look.add_argument("--images-per-pack", type=int, help="of pixels: pixels.images_per_pack")
    look.add_argument(
        "--draws-per-caption", type=int, default=1, help="of latents: packing.draws_per_caption"
    )
    look.add_argument("--max-side", type=int, help="of latents: packing.max_side")
    look.add_argument("--samples", type=int, default=24, help="to show on the page")
    look.add_argument("--out", type=Path, help="HTML page (default: SHARDS/doctor.html)")
    look.add_argument("--quarantine", type=Path, help="write what is damaged here, for data.quarantine")
    index = commands.add_parser("index", help="make shards that others wrote readable, in place")
    index.add_argument("shards", type=Path)
    index.set_defaults(run=_index)
    arguments = parser.parse_args()
    entry.use_torch()
    for line in arguments.run(arguments) if "run" in arguments else _write(arguments):
        say(line)


def _write(arguments: argparse.Namespace) -> list[str]:
    return shard_sources.write(read_options(shard_sources.SOURCES[arguments.command], arguments))


def _verify(arguments: argparse.Namespace) -> list[str]:
    from data.shards import verify

    if problems := verify(arguments.shards, arguments.processes):
        raise UserError("; ".join(problems))
    return [f"{arguments.shards}: complete and undamaged"]


def _doctor(arguments: argparse.Namespace) -> list[str]:
    from data.doctor.examine_set import diagnose
    from data.doctor.readiness import Launch
    from data.shards.quarantine import add_to_quarantine
    from report.doctor import write_page

    page = arguments.out or arguments.shards / "doctor.html"
    files.check_signed(page, files.PAGE_SIGN)
    launch = Launch(
        arguments.ranks,
        arguments.streams,
        arguments.tokens_per_pack,
        arguments.images_per_pack,
        arguments.draws_per_caption,
        arguments.max_side,
    )
    found = diagnose(
        arguments.shards, num_processes=arguments.processes, launch=launch, num_shown=arguments.samples
    )
    write_page(found, page)
    say(found.text())
    if arguments.quarantine:
        add_to_quarantine(arguments.quarantine, *found.lost())
        say(f"{arguments.quarantine}: give it to the training as data.quarantine")
    if found.problems:
        raise UserError(f"{arguments.shards}: {found.verdict}; see {page}")
    return [f"{page}: written"]


def _index(arguments: argparse.Namespace) -> list[str]:
    from data.sources.tar_indexing import index_shards

    manifest = index_shards(arguments.shards)
    return [f"{arguments.shards}: {manifest.num_samples} samples in {len(manifest.shards)} shards"]


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
