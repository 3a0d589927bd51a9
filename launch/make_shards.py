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
    emoji = commands.add_parser("emoji", help="the embedded data set: scenes, edits, identities")
    emoji.add_argument("--config", default=entry.REPOSITORY / "configs/quickstart/data.yaml")
    emoji.add_argument("--out", type=Path, required=True, help="folder of the six data sets")
    emoji.add_argument("--processes", type=int, default=2, help="the bytes do not depend on it")
    emoji.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config to change")
    folder = commands.add_parser("folder", help="a folder of images with captions, or one folder per class")
    folder.add_argument("--images", type=Path, required=True)
    folder.add_argument("--captions", type=Path, help='jsonl of {"file", "caption"}; without it NAME.txt')
    folder.add_argument(
        "--labels", action="store_true", help="folders below --images are classes; no captions"
    )
    folder.add_argument("--out", type=Path, required=True, help="folder of the data set")
    folder.add_argument("--reject-bad", action="store_true", help="list bad items in rejected.jsonl, go on")
    folder.add_argument("--max-samples-per-shard", type=int, default=10_000)
    commands.add_parser("verify", help="recount everything").add_argument("out", type=Path)
    arguments = parser.parse_args()
    for line in {"emoji": _emoji, "folder": _folder, "verify": _verify}[arguments.command](arguments):
        print(line)


def _emoji(arguments: argparse.Namespace) -> list[str]:
    config = load(EmojiConfig, arguments.config, arguments.overrides)
    sources = {arguments.out / source.name: source for source in emoji_sources(config)}
    ledgers = write_sources(sources, config.max_samples_per_shard, arguments.processes)
    return [f"{directory}: {ledger}" for directory, ledger in ledgers.items()]


def _folder(arguments: argparse.Namespace) -> list[str]:
    source = FolderSource(arguments.images, arguments.captions, labels=arguments.labels)
    report = Progress(len(source)).show
    shard = arguments.max_samples_per_shard
    ledger = write_source(source, arguments.out, shard, reject_bad=arguments.reject_bad, report=report)
    return [f"{arguments.out}: {ledger}"]


def _verify(arguments: argparse.Namespace) -> list[str]:
    if problems := verify(arguments.out):
        raise UserError("; ".join(problems))
    return [f"{arguments.out}: complete and undamaged"]


if __name__ == "__main__":
    sys.exit(entry.run(main))
