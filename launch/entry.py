"""What every entry point shares: one line for a person's mistake, and the right packages on the path."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine import distributed
from engine.config import ConfigError, UserError, dump, load
from engine.redaction import redact

PACKAGES = ("data", "tokenizer", "generator", "evaluation", "engine")
REPOSITORY = Path(__file__).resolve().parent.parent

ConfigT = TypeVar("ConfigT")


def run(main: Callable[[], None], *, has_ranks: bool = True) -> int:
    """Calls `main` and returns the exit status: 0, 2 after printing a UserError as one line, 130 after Ctrl-C.

    `has_ranks`: the program is started once per rank, and before they meet rank 0 speaks for all.
    """
    try:
        check_packages()
        main()
    except UserError as error:
        rank = os.environ.get("RANK", "0") if has_ranks else "0"
        if distributed.is_started():
            print(f"error: rank {rank}: {redact(str(error))}", file=sys.stderr, flush=True)
            os._exit(2)  # the other ranks may wait in a collective: no clean-up that would wait for them
        if rank == "0":  # before the ranks meet, all of them see the same mistake
            print(f"error: {redact(str(error))}", file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        if not has_ranks:
            print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            return 130
        raise
    return 0


def check_packages() -> None:
    """The registry has packages named `tokenizer` and `data`: refuses to run with those in place of ours."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent.parent != REPOSITORY:
            raise UserError(
                f"package '{name}' comes from {origin}, not from {REPOSITORY}; run `pip install -e .` there"
            )


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that also accepts the `--local_rank` which the deepspeed launcher appends."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def config_parser(description: str, default: str) -> argparse.ArgumentParser:
    """`parser` with --config (default: the paper's), --dry-run, and `key=value` overrides."""
    result = parser(description)
    result.add_argument("--config", default=str(REPOSITORY / default), help=f"YAML file (default {default})")
    result.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and sizes, then exit"
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to change")
    return result


def read_config(cls: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The resolved config of a run. Raises ConfigError."""
    overrides: Sequence[str] = arguments.overrides
    for override in overrides:
        if "=" not in override:
            raise ConfigError(f"override '{override}': write it as section.key=value")
    return load(cls, arguments.config, overrides)


def print_config(config: object) -> None:
    """The resolved config as YAML, as --dry-run shows it: without secrets."""
    print(dump(config), end="")
