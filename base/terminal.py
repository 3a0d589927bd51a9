"""What is printed: every line of every command goes through here, so that no name from outside steers a terminal.

No terminal, pipe or full disk behind stdout ends a command: what cannot be printed is lost, and stderr says so once.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import re
import sys
import unicodedata
from typing import TextIO

_KEPT = "\n\t"
_HIDDEN = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode's controls, halves of characters, and the two line ends that a file of lines does not have."""
_TURNING = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of what follows: with them a name can look like another."""
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def printable(text: str) -> str:
    """`text` with control characters as text: the escape that starts a colour becomes the four characters \\x1b."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(sign: str) -> str:
    if sign in _KEPT or (unicodedata.category(sign) not in _HIDDEN and sign not in _TURNING):
        return sign
    return sign.encode("unicode_escape", "surrogatepass").decode()


def say(text: object, stream: TextIO | None = None) -> None:
    """A line, or several, at once (default: to stdout), or nothing where nobody can read it any more.

    A launcher that was stopped closes the pipe while its ranks still save: that must not be what ends them.
    """
    _write(printable(str(text)) + "\n", sys.stdout if stream is None else stream)


def hold() -> None:
    """At the start of a command: what is printed past `say` (by argparse) cannot fail, and 0 to 2 are no file of ours.

    Where a shell has closed stdout (>&-) the next file that is opened would get its number, and what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # programs that are started need them as well
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """At the end of a command, in place of the interpreter's own flush, whose failure would be the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                _to_nowhere(stream)


def show(screen: str) -> None:
    """A screen of ours, with its colours, on stdout. What comes from outside went through `printable` before."""
    pieces = _COLOUR.split(screen)
    _write(
        "".join(piece if index % 2 else printable(piece) for index, piece in enumerate(pieces)), sys.stdout
    )


def clear() -> None:
    """Empties the terminal."""
    _write("\x1b[H\x1b[2J", sys.stdout)


_failed: set[int] = set()


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None or stream.closed:  # somebody has closed it
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=stream, flush=True)
    except BrokenPipeError:
        _to_nowhere(stream)
    except (
        OSError
    ) as error:  # the text stays in a buffer of limited size, for the case that there is room again
        if id(stream) not in _failed:
            _failed.add(id(stream))
            atexit.register(flush)
            if stream is sys.stdout:
                say(f"WARNING: stdout: {error.strerror}; what cannot be printed is lost", sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    """What is left in its buffer, and all that follows, is dropped."""
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())
