"""What every entry point shares: one line for a person's mistake, and the right packages on the path."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from engine import distributed, peers
from engine.config import ConfigError, StoppedError, UserError, dump, load
from engine.logs import say
from engine.redaction import redact
from engine.tf32 import allow_tf32

PACKAGES = ("data", "tokenizer", "generator", "evaluation", "engine")
REPOSITORY = Path(__file__).resolve().parent.parent
STOPPED = 75
LOST_CONTACT = peers.EXIT_STATUS

ConfigT = TypeVar("ConfigT")


def run(main: Callable[[], None], *, has_ranks: bool = True) -> int:
    """Calls `main` and returns the exit status; a UserError is printed as one line.

    0: finished. 2: a person has to do something. STOPPED: ended by a signal and saved. LOST_CONTACT: another rank is
    gone. 130: Ctrl-C. After the second and third the same command goes on; schedulers may give it again.
    `has_ranks`: the program is started once per rank, and before they meet rank 0 speaks for all.
    """
    if has_ranks and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        # launch/node.sh ignores it for the launcher's sake; a rank that hangs before training must end by it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    allow_tf32(True)
    try:
        check_packages()
        main()
    except UserError as error:
        return _end(error, has_ranks)
    except RuntimeError as error:
        lost = peers.lost_contact(error)
        if lost is None:
            raise
        return _end(lost, has_ranks)
    except KeyboardInterrupt:
        if not has_ranks:
            print("stopped; the same command goes on from here", file=sys.stderr, flush=True)
            return 130
        raise
    return 0


def _end(error: UserError, has_ranks: bool) -> int:
    rank = os.environ.get("RANK", "0") if has_ranks else "0"
    status = {StoppedError: STOPPED, peers.LostContactError: LOST_CONTACT}.get(type(error), 2)
    if distributed.is_started():
        say(f"error: rank {rank}: {redact(str(error))}", sys.stderr)
        os._exit(status)  # the other ranks may wait in a collective: no clean-up that would wait for them
    # Before the ranks meet, all of them see the same mistake, but whether they can meet.
    if rank == "0" or isinstance(error, peers.LostContactError):
        say(f"error: {redact(str(error))}", sys.stderr)
    return status


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
