"""Reads a checkpoint by parameter: every rank takes the slices it needs from the files that hold them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import safetensors
from torch import Tensor

from base import limits
from base.config import UserError
from engine.layout import Segment


class Saved:
    """The files of one checkpoint, as a context manager. Files stay open; only the requested slices are read."""

    def __init__(self, directory: Path, names: Sequence[str], own: int) -> None:
        """`names`: the files in rank order. Some values lie in several files: file `own` is then preferred."""
        self._directory = directory
        self._paths = [directory / name for name in [*names[own : own + 1], *names[:own], *names[own + 1 :]]]
        self._stack = ExitStack()
        # (ENGINE/KIND, parameter) -> (first value, end, file, tensor's name)
        self._pieces: dict[tuple[str, str], list[tuple[int, int, Any, str]]] = defaultdict(list)

    def __enter__(self) -> Saved:
        for path in self._paths:
            try:
                limits.check_regular(path)
                file = self._stack.enter_context(safetensors.safe_open(path, "pt"))
                for name in file.keys():  # noqa: SIM118  # it is no dict
                    place, _, start = name.rpartition(":")
                    engine, kind, parameter = place.split("/", 2)
                    (length,) = file.get_slice(name).get_shape()
                    piece = (int(start), int(start) + length, file, name)
                    self._pieces[f"{engine}/{kind}", parameter].append(piece)
            except (OSError, ValueError, safetensors.SafetensorError) as error:
                self._stack.close()
                reason = " ".join(str(error).split())[:100]
                raise UserError(
                    f"{path}: is no file of a checkpoint ({reason}); take an earlier one"
                ) from None
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kinds(self, engine: str, parameter: str) -> set[str]:
        """The KINDs that the checkpoint holds of a parameter."""
        owner = f"{engine}/"
        return {
            kind.removeprefix(owner)
            for kind, name in self._pieces
            if name == parameter and kind.startswith(owner)
        }

    def fill(self, kind: str, segments: Sequence[Segment], flat: Tensor) -> None:
        """Writes the segments' values of ENGINE/KIND into a flat tensor; its padding stays as it is.

        Raises UserError: a value is in no file.
        """
        for segment in segments:
            position, end = segment.start, segment.start + segment.length
            pieces = self._pieces[kind, segment.parameter]
            while position < end:
                first, last, file, name = next(
                    (piece for piece in pieces if piece[0] <= position < piece[1]), (0, 0, None, "")
                )
                if file is None:
                    where = f"{kind}/{segment.parameter}"
                    raise UserError(
                        f"{self._directory}: {where} lacks value {position}; take an earlier checkpoint"
                    )
                stop = min(end, last)
                place = segment.offset + position - segment.start
                values = file.get_slice(name)[position - first : stop - first]
                flat[place : place + stop - position].copy_(values)
                position = stop
