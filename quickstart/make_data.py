"""Makes the miniature's data sets: quickstart/make_data.py --out DIR [key=value ...]. Running it again continues."""

import argparse
import sys

from base.config import load
from base.options import add_options, read_options
from base.terminal import say
from launch.runs import entry
from launch.runs.shard_sources import WorkerOptions, told, workers
from quickstart.pictures.config import EmojiConfig


def main() -> None:
    """Writes scenes, edits, identities and, if the config asks for them, classes; each to its folder below --out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=entry.REPOSITORY / "configs/quickstart/data.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the config to change")
    add_options(parser, WorkerOptions)
    arguments = parser.parse_args()
    options = read_options(WorkerOptions, arguments)
    config = load(EmojiConfig, arguments.config, arguments.overrides)
    entry.use_torch()
    from data.sources.base import InUnits
    from data.sources.write import write_sources
    from quickstart.pictures.source import emoji_sources

    per_shard = config.max_samples_per_shard
    sources = {options.out / one.name: InUnits(one, per_shard) for one in emoji_sources(config)}
    for line in told(write_sources(sources, workers(options))):
        say(line)


if __name__ == "__main__":
    sys.exit(entry.run(main, has_ranks=False))
