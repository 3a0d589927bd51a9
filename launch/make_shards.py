"""Makes or checks shards: launch/make_shards.py emoji | folder | verify (each with --help)"""

import argparse
import sys
from pathlib import Path

from data.shards import verify
from data.sources.emoji import EmojiConfig, emoji_sources
from data.sources.folder import FolderSource
from data.sources.write import Progress, write_source, write_sources
from engine.config import UserError, load
from launch import entry


def main() -> None:
    """Runs one of the three commands; run again, it continues where it stopped."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("emoji", help="the embedded data set: scenes, edits, identities")
    command.add_argument("--config", default=str(entry.REPOSITORY / "configs/quickstart/data.yaml"))
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--processes", type=int, default=2, help="the bytes do not depend on it")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config to change")
    command = commands.add_parser("folder", help="a folder of images with captions")
    command.add_argument("--images", type=Path, required=True)
    command.add_argument("--captions", type=Path, help='jsonl of {"file", "caption"}; without it NAME.txt')
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--reject-bad", action="store_true", help="list bad items in rejected.jsonl, go on")
    command.add_argument("--max-samples-per-shard", type=int, default=10_000)
    commands.add_parser("verify", help="recount everything").add_argument("directory", type=Path)
    arguments = parser.parse_args()
    {"emoji": emoji, "folder": folder, "verify": check}[arguments.command](arguments)


def emoji(arguments: argparse.Namespace) -> None:
    """Six data sets below --out."""
    config = load(EmojiConfig, arguments.config, arguments.overrides)
    sources = {arguments.out / source.name: source for source in emoji_sources(config)}
    ledgers = write_sources(
        sources, max_samples_per_shard=config.max_samples_per_shard, num_processes=arguments.processes
    )
    for directory, ledger in ledgers.items():
        print(f"{directory}: {ledger}")


def folder(arguments: argparse.Namespace) -> None:
    """One data set in --out."""
    source = FolderSource(arguments.images, arguments.captions)
    ledger = write_source(
        source,
        arguments.out,
        max_samples_per_shard=arguments.max_samples_per_shard,
        reject_bad=arguments.reject_bad,
        report=Progress(len(source)).show,
    )
    print(f"{arguments.out}: {ledger}")


def check(arguments: argparse.Namespace) -> None:
    """Names every problem of a data set."""
    problems = verify(arguments.directory)
    for problem in problems[1:]:
        print(f"error: {problem}", file=sys.stderr)
    if problems:
        raise UserError(problems[0])
    print(f"{arguments.directory}: complete and undamaged")


if __name__ == "__main__":
    sys.exit(entry.run(main))
