"""Checks whether a training could start on a data set (streams, ranks, budget), and how long an epoch is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.plan.plan import epoch_order
from data.samples.layouts import packed_lengths
from data.shards import LatentInfo, ShardDataset


@dataclass(frozen=True)
class Launch:
    """The settings of a run that decide whether it can start, as in its config."""

    num_ranks: int = 1
    num_streams: int = 8  # data.num_streams
    tokens_per_pack: int | None = None  # packing.tokens_per_pack, for latents
    images_per_pack: int | None = None  # pixels.images_per_pack, for pixels
    draws_per_caption: int = 1  # packing.draws_per_caption, for latents
    max_side: int | None = None  # packing.max_side, latent pixels; None: not checked
    seed: int = 0  # data.seed, which decides the samples of a stream

    def __post_init__(self) -> None:
        counts = (
            "num_ranks",
            "num_streams",
            "tokens_per_pack",
            "images_per_pack",
            "draws_per_caption",
            "max_side",
        )
        for name in counts:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; give at least 1")

    def budget(self, latent: LatentInfo | None) -> int | None:
        """Budget of a pack in the unit of `sample_lengths`; None: not given. Raises UserError: in another unit."""
        if latent is None and self.tokens_per_pack is not None:
            raise UserError("the shards hold pixels; give the budget as --images-per-pack")
        if latent is not None and self.images_per_pack is not None:
            raise UserError("the shards hold latents; give the budget as --tokens-per-pack")
        return self.images_per_pack if latent is None else self.tokens_per_pack


@dataclass(frozen=True)
class Readiness:
    """Obstacles to a start, remarks, and facts about an epoch."""

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]


def sample_lengths(dataset: ShardDataset, draws_per_caption: int = 1) -> npt.NDArray[np.int64]:
    """Share of each sample in a pack's budget, int64 [len(dataset)]: tokens for latents, 1 for pixels.

    The index holds the numbers of text tokens, so no text tokenizer is needed.
    """
    latent = dataset.manifest.latent
    if latent is None:
        return np.ones(len(dataset), np.int64)
    return packed_lengths(dataset, latent, draws_per_caption)


def readiness(dataset: ShardDataset, launch: Launch) -> Readiness:
    """Checks a launch on an opened data set. Raises UserError: the budget is in the wrong unit."""
    latent = dataset.manifest.latent
    budget = launch.budget(latent)
    unit = "samples" if latent is None else "tokens"
    num_streams, num_ranks = launch.num_streams, launch.num_ranks
    lengths = sample_lengths(dataset, launch.draws_per_caption)
    problems: list[str] = []
    notes: list[str] = []
    if num_ranks > num_streams:
        problems.append(
            f"{num_ranks} ranks, but {num_streams} streams: ranks would have no data; raise data.num_streams"
        )
    elif num_streams % num_ranks:
        notes.append(
            f"{num_streams} streams on {num_ranks} ranks: some ranks have a pack more than others at every step, "
            "and the others wait; take a multiple"
        )
    if latent is not None and launch.max_side is not None and max(latent.shape[1:]) > launch.max_side:
        side = "x".join(map(str, latent.shape[1:]))
        problems.append(f"latents of {side} do not fit max_side {launch.max_side}; raise packing.max_side")
    if budget is not None and (too_long := np.flatnonzero(lengths > budget)).size:
        first = dataset.read([int(too_long[0])])[0].key
        problems.append(
            f"{len(too_long)} samples are longer than a pack of {budget} {unit}, the first is '{first}' with "
            f"{lengths[too_long[0]]}; raise the budget or leave them out"
        )
    facts = [
        ("ranks", f"{num_ranks:,}"),
        ("streams", f"{num_streams:,}"),
        ("length of a sample", f"{_span(lengths)} {unit}, mean {lengths.mean():,.1f}"),
    ]
    if len(dataset) < num_streams:
        problems.append(
            f"{len(dataset)} samples cannot feed {num_streams} streams; lower data.num_streams or add data"
        )
    else:
        facts += _epoch(dataset, launch, lengths, budget, unit)
    return Readiness(tuple(problems), tuple(notes), tuple(facts))


def _epoch(
    dataset: ShardDataset, launch: Launch, lengths: npt.NDArray[np.int64], budget: int | None, unit: str
) -> list[tuple[str, str]]:
    """Facts about the streams in the first epoch; later epochs differ by a few blocks."""
    num_samples, totals = [], []
    for stream in range(launch.num_streams):
        order = epoch_order(len(dataset), dataset.fingerprint, launch.seed, 0, launch.num_streams, stream)
        num_samples.append(len(order))
        totals.append(int(lengths[order].sum()))
    facts = [("samples of a stream", _span(num_samples))]
    if budget is None:
        return facts
    packs = [-(-total // budget) for total in totals]
    steps = max(1, round(sum(totals) / budget / launch.num_streams))
    return [
        *facts,
        ("budget of a pack", f"{budget:,} {unit}"),
        ("packs of a stream in an epoch, about", _span(packs)),
        ("steps of an epoch, about", f"{steps:,}"),
        ("samples of a step, about", f"{len(dataset) / steps:,.1f}"),
    ]


def _span(values: Sequence[int] | npt.NDArray[np.int64]) -> str:
    """`1 to 12`, or the single value if all are equal."""
    low, high = int(np.min(values)), int(np.max(values))
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
