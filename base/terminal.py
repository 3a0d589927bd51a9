"""Prints every line of every command, without control characters that could steer a terminal.

A closed terminal or pipe or a full disk behind stdout does not end a command: lines that cannot be printed are lost.
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
"""Unicode categories that are escaped: controls, lone surrogates, and the line and paragraph separators."""
_TURNING = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that change the direction of the text after them, which can make one name look like another."""
_COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def printable(text: str) -> str:
    """`text` with control characters escaped: the escape that starts a colour becomes the four characters \\x1b."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(sign: str) -> str:
    if sign in _KEPT or (unicodedata.category(sign) not in _HIDDEN and sign not in _TURNING):
        return sign
    return sign.encode("unicode_escape", "surrogatepass").decode()


def say(text: object, stream: TextIO | None = None) -> None:
    """Prints one or several lines at once (default: to stdout). Does nothing if the stream is closed.

    A stopped launcher closes the pipe while its ranks still save; the closed pipe must not end the ranks.
    """
    _write(printable(str(text)) + "\n", sys.stdout if stream is None else stream)


def hold() -> None:
    """Prepares the standard streams at the start of a command, so that prints past `say` (by argparse) cannot fail.

    Opens descriptors 0 to 2 if the shell has closed them (>&-): otherwise the next file to be opened would get stdout's
    number, and everything that a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)  # child processes need them, too
    os.close(descriptor)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flushes at the end of a command, before the interpreter's own flush, whose failure would set the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and not stream.closed:
            try:
                stream.flush()
            except OSError:
                _to_nowhere(stream)


def show(screen: str) -> None:
    """Prints a screen with colours on stdout. Every other control character is escaped."""
    pieces = _COLOUR.split(screen)
    _write(
        "".join(piece if index % 2 else printable(piece) for index, piece in enumerate(pieces)), sys.stdout
    )


def clear() -> None:
    """Empties the terminal."""
    _write("\x1b[H\x1b[2J", sys.stdout)


_failed: set[int] = set()


def _write(text: str, stream: TextIO | None) -> None:
    if stream is None or stream.closed:  # closed by the shell or the caller
        return
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=stream, flush=True)
    except BrokenPipeError:
        _to_nowhere(stream)
    except OSError as error:  # the text stays in the stream's bounded buffer until there is room again
        if id(stream) not in _failed:
            _failed.add(id(stream))
            atexit.register(flush)
            if stream is sys.stdout:
                say(f"WARNING: stdout: {error.strerror}; what cannot be printed is lost", sys.stderr)


def _to_nowhere(stream: TextIO) -> None:
    """Redirects the stream to /dev/null: its buffer and all later text are dropped."""
    with contextlib.suppress(io.UnsupportedOperation), open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), stream.fileno())
