"""What is printed: every line of every command goes through here, so that no name from outside steers a terminal."""

from __future__ import annotations

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


def show(screen: str) -> None:
    """A screen of ours, with its colours, on stdout. What comes from outside went through `printable` before."""
    pieces = _COLOUR.split(screen)
    _write(
        "".join(piece if index % 2 else printable(piece) for index, piece in enumerate(pieces)), sys.stdout
    )


def clear() -> None:
    """Empties the terminal."""
    _write("\x1b[H\x1b[2J", sys.stdout)


def _write(text: str, stream: TextIO) -> None:
    try:
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end="", file=stream, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), stream.fileno())
