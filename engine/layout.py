"""Maps values of parameters to positions in a flat shard: the coordinates of checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Sizes = Sequence[tuple[str, int]]
"""Names and element counts of parameters, in the order in which their values are concatenated."""


@dataclass(frozen=True)
class Segment:
    """`length` values of the flattened `parameter`, from index `start`, that lie at `offset` in a flat shard."""

    parameter: str
    start: int
    length: int
    offset: int


def window(sizes: Sizes, begin: int, length: int) -> list[Segment]:
    """ZeRO-1 and 2: a shard is `length` values, from `begin`, of all parameters concatenated.

    Values behind the last parameter are padding and belong to no segment.
    """
    segments, position = [], 0
    for name, numel in sizes:
        first, last = max(position, begin), min(position + numel, begin + length)
        if first < last:
            segments.append(Segment(name, first - position, last - first, first - begin))
        position += numel
    return segments


def pieces(sizes: Sizes, rank: int, world: int) -> list[Segment]:
    """ZeRO-3: a shard holds piece `rank` of `world` equal ones of every parameter, each padded to ceil(n / world)."""
    segments, offset = [], 0
    for name, numel in sizes:
        piece = -(-numel // world)
        start = min(rank * piece, numel)
        length = min(piece, numel - start)
        if length:
            segments.append(Segment(name, start, length, offset))
        offset += piece
    return segments


def whole(sizes: Sizes) -> list[Segment]:
    """Every parameter whole, concatenated (the momentum of Muon under ZeRO-1 and 2)."""
    return window(sizes, 0, sum(numel for _, numel in sizes))


def covered(segments: Iterable[Segment]) -> int:
    """Total number of values in the segments."""
    return sum(segment.length for segment in segments)
