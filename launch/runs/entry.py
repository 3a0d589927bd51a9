"""Shared by every entry point: exit statuses, one line for a person's mistake, checked packages, and parsers."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from base import FOLDERS, files, terminal, threads
from base.config import ConfigError, StoppedError, UserError, dump, load
from base.redaction import redact
from base.terminal import say
from engine.job_endings import LOST_CONTACT, End, EndedError, LostContactError

REPOSITORY = Path(__file__).resolve().parents[2]
STOPPED = 75
INTERRUPTED = 130
STATUSES = {
    StoppedError: STOPPED,
    LostContactError: LOST_CONTACT,
    UserError: 2,
    KeyboardInterrupt: INTERRUPTED,
}
"""Exit status of an error, by the first class that fits; 1: a bug."""

ConfigT = TypeVar("ConfigT")


def run(main: Callable[[], None], *, has_ranks: bool = True) -> int:
    """Calls `main` and returns the exit status, equal on every rank; prints a UserError as one line.

    0: finished. 2: a person must act. STOPPED: a signal ended it and it is saved. LOST_CONTACT: another rank is gone.
    INTERRUPTED: Ctrl-C. After the last three a repeated command goes on; schedulers may repeat it. 1: a bug.
    `has_ranks`: the program is started once a rank; the first rank that cannot go on speaks for all.
    """
    if has_ranks and signal.getsignal(signal.SIGTERM) is signal.SIG_IGN:
        # launch/node.sh makes the launcher ignore SIGTERM; a rank that hangs before training must still end by it.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    terminal.hold()
    sys.excepthook = _show_bug
    rank = int(os.environ.get("RANK", "0")) if has_ranks else 0
    world = int(os.environ.get("WORLD_SIZE", "1")) if has_ranks else 1
    try:
        check_packages()
        main()
        return 0
    except EndedError as error:
        status = error.end.status
    except (Exception, KeyboardInterrupt, SystemExit) as error:
        if explained := _lost_contact(error) or files.full_disk(error):
            error = explained
        if isinstance(error, SystemExit) and (world == 1 or not error.code):
            raise  # --help, or an error that argparse has printed
        if world == 1 and not isinstance(error, (UserError, KeyboardInterrupt)):
            raise
        own = End(rank, _status(error), redact(_text(error)))
        reason = error
        status = _end(own, world, lambda: _tell(own, reason))
    finally:
        terminal.flush()
    if _is_joined():
        os._exit(status)  # no clean-up: it could wait for ranks that are in a collective
    return status


def use_torch() -> None:
    """Loads torch, as every command has it: with TF32 allowed, and on this process's share of the cores.

    A command calls it when it begins its work, and imports the modules of its work then, so that `--help` and a
    mistyped key do not wait for them.
    """
    from base.tf32 import allow_tf32

    allow_tf32(True)
    threads.share_cores()


def _is_joined() -> bool:
    """Whether this process has joined the process group. Without torch it has not."""
    if "torch" not in sys.modules:
        return False
    from engine import distributed

    return distributed.is_started()


def _lost_contact(error: BaseException) -> LostContactError | None:
    """As engine.peers.lost_contact. A process without torch has no contact to lose."""
    if "torch" not in sys.modules:
        return None
    from engine import peers

    return peers.lost_contact(error)


def _end(own: End, world: int, tell: Callable[[], None]) -> int:
    """As engine.peers.end. A process that is alone has nobody else to tell, and needs no torch."""
    if world == 1:
        tell()
        return own.status
    from engine import peers

    return peers.end(own, world, tell)


def _show_bug(_kind: object, error: BaseException, _trace: object) -> None:
    """Prints a bug's traceback without secrets: a library's error may contain a url with a password."""
    say(redact("".join(traceback.format_exception(error))), sys.stderr)


def _status(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    for cls, status in STATUSES.items():
        if isinstance(error, cls):
            return status
    return 1


def _text(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped; the same command goes on from here"
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else f"status {error.code}; see what it printed"
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _tell(own: End, error: BaseException) -> None:
    """Prints what ended this rank: one line, and for a bug the traceback."""
    if own.status == 1 and not isinstance(error, SystemExit):
        _show_bug(None, error, None)
    what = "" if own.status == INTERRUPTED else "error: "
    where = f"rank {own.rank}: " if _is_joined() or own.rank else ""
    say(f"{what}{where}{own.text}", sys.stderr)


def check_packages() -> None:
    """Checks that our packages are imported. Raises UserError: others of their names (`data`, `tokenizer`) are."""
    for name in FOLDERS:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if origin is None or origin.parent.parent != REPOSITORY:
            raise UserError(
                f"package '{name}' comes from {origin}, not from {REPOSITORY}; run `pip install -e .` there"
            )


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser that also accepts `--local_rank`, which the deepspeed launcher appends."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    return result


def config_parser(description: str, default: str) -> argparse.ArgumentParser:
    """`parser` with --config (default: the paper's), --dry-run, and `key=value` overrides."""
    result = parser(description)
    text = f"YAML file (default {default}); give it again for a further one, which wins over those before"
    result.add_argument("--config", action="append", help=text)
    result.set_defaults(default_config=str(REPOSITORY / default))
    result.add_argument(
        "--dry-run", action="store_true", help="print the resolved config and sizes, then exit"
    )
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="fields to change")
    return result


def config_words(arguments: argparse.Namespace) -> tuple[Sequence[str], Sequence[str]]:
    """The files and the overrides of a config. Raises ConfigError."""
    for override in arguments.overrides:
        if "=" not in override:
            raise ConfigError(
                f"override '{override}': write it as section.key=value, and a further file as --config FILE"
            )
    return arguments.config or [arguments.default_config], arguments.overrides


def read_config(cls: type[ConfigT], arguments: argparse.Namespace) -> ConfigT:
    """The resolved config of a run. Raises ConfigError."""
    return load(cls, *config_words(arguments))


def print_config(config: object) -> None:
    """Prints the resolved config as YAML, secrets masked, for --dry-run."""
    say(dump(config).rstrip("\n"))
