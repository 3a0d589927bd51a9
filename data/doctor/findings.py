"""Turns sums over a data set into problems, notes, tables and histograms for people."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.doctor.sample_checks import Tally, Vector
from data.shards import LatentInfo
from data.shards.verification import Problem

MAX_BARS = 12
MAX_ROWS = 20
# Tolerance of a channel's mean and of its standard deviation, as a share of the deviation; sampling error is added.
# Data that is encoded with another set's statistics (statistics_from) must pass.
STATISTICS_TOLERANCE = 1.0
CHANCE_DEVIATIONS = 4.0


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first column names the rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def lines(self) -> list[str]:
        """The table as aligned lines for a terminal."""
        cells = [self.header, *self.rows] if any(self.header) else list(self.rows)
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        return [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in cells
        ]


@dataclass(frozen=True)
class Histogram:
    """How often values occur, by range."""

    title: str
    summary: str  # "min 3, median 12, max 40"
    bars: tuple[tuple[str, int], ...]  # (range of values, count)


def problems_of(tally: Tally, latent: LatentInfo | None) -> list[Problem]:
    """Problems of the whole set, which no single sample shows."""
    return [*_class_problems(tally), *(_latent_problems(tally, latent) if latent is not None else ())]


def notes(tally: Tally) -> list[str]:
    """Remarks that are no problems."""
    found = []
    if len(tally.parts) > 1:
        found.append(f"samples of {len(tally.parts)} different sets of parts")
    if tally.num_unchanged:
        found.append(f"{tally.num_unchanged} edits change nothing: source and target are equal")
    labels = {label for label, _ in tally.classes}
    missing = max(labels) + 1 - len(labels) if labels else 0
    if missing:
        gaps = itertools.islice((label for label in range(max(labels)) if label not in labels), 5)
        listed = ", ".join(map(str, gaps))
        found.append(
            f"{missing} of the labels 0 to {max(labels)} have no sample: {listed}{', ...' * (missing > 5)}"
        )
    return found


def tables(tally: Tally, latent: LatentInfo | None) -> list[Table]:
    """Tables of how often parts, captions, classes and statistics occur."""
    found = [_counts("Parts", "parts", tally.parts)]
    if tally.num_images:
        rows = [
            ("images", f"{tally.num_images:,}"),
            ("without colour", _share(tally.num_grey, tally.num_images)),
        ]
        found.append(Table("Images", ("", ""), tuple(rows)))
    if tally.groups:
        found.append(_counts("Tasks and kinds", "group", tally.groups))
    if tally.texts:
        hashes = np.concatenate(tally.caption_hashes)
        repeated = len(hashes) - len(np.unique(hashes))
        rows = [(kind, f"{count:,}") for kind, count in tally.texts.most_common(MAX_ROWS)]
        rows.append(("repeat an earlier one exactly", _share(repeated, len(hashes))))
        found.append(Table("Captions", ("field", "captions"), tuple(rows)))
    if tally.classes:
        found.append(_class_table(tally))
    if latent is not None and tally.latent_values.any():
        mean, std = _moments(tally)
        channels = [(str(c), f"{mean[c]:+.3f}", f"{std[c]:.3f}") for c in range(len(mean))]
        title = f"Latents of {tally.num_measured:,} samples, normalised by the manifest (expected: 0 and 1)"
        found.append(Table(title, ("channel", "mean", "deviation"), tuple(channels)))
    return found


def histograms(tally: Tally) -> Iterator[Histogram]:
    """Histograms of image sizes and caption lengths."""
    for title, counts in (
        ("Short side of the images, px", tally.short_sides),
        ("Long side of the images, px", tally.long_sides),
        ("Words of a caption", tally.words),
        ("Text tokens of the longest caption", tally.text_tokens if any(tally.text_tokens) else {}),
    ):
        if counts:
            yield histogram(title, counts)


def histogram(title: str, counts: Mapping[int, int]) -> Histogram:
    """Up to MAX_BARS bars of equal width; the last one includes all values above the 99.5th percentile."""
    values = sorted(counts)
    below = np.cumsum([counts[value] for value in values])
    total = int(below[-1])

    def quantile(share: float) -> int:
        return values[int(np.searchsorted(below, share * total))]

    summary = f"min {values[0]:,}, median {quantile(0.5):,}, max {values[-1]:,}"
    if len(values) <= MAX_BARS:
        return Histogram(title, summary, tuple((f"{value:,}", counts[value]) for value in values))
    low, high = values[0], max(quantile(0.995), values[0] + 1)
    width = -(-(high + 1 - low) // (MAX_BARS - 1))
    bars: collections.Counter[int] = collections.Counter()
    for value in values:
        bars[min((value - low) // width, MAX_BARS - 1)] += counts[value]
    labels = [f"{low + i * width:,} to {low + (i + 1) * width - 1:,}" for i in range(MAX_BARS - 1)]
    labels.append(f"from {low + (MAX_BARS - 1) * width:,}")
    last = max(bars)
    return Histogram(title, summary, tuple((labels[i], bars[i]) for i in range(last + 1)))


def _class_problems(tally: Tally) -> Iterator[Problem]:
    num_labelled = sum(tally.classes.values())
    if 0 < num_labelled < tally.num_samples and not tally.texts:
        yield Problem(
            "labels", f"labels: {tally.num_samples - num_labelled} samples have none, the others do"
        )
    names = collections.defaultdict(set)
    labels = collections.defaultdict(set)
    for label, name in tally.classes:
        names[label].add(name)
        if name:
            labels[name].add(label)
    for label in sorted(label for label in names if len(names[label]) > 1):
        yield Problem("labels", f"labels: {label} stands for several classes: {_list(sorted(names[label]))}")
    for name in sorted(name for name in labels if len(labels[name]) > 1):
        yield Problem("labels", f"labels: class '{name}' has several: {_list(sorted(labels[name]))}")


def _latent_problems(tally: Tally, latent: LatentInfo) -> Iterator[Problem]:
    """Problems of channels whose statistics differ from the manifest's."""
    if not tally.latent_values.any():
        return
    mean, std = _moments(tally)
    is_sample = tally.num_measured < tally.num_samples
    tolerance = STATISTICS_TOLERANCE + is_sample * CHANCE_DEVIATIONS / np.sqrt(tally.num_measured)
    for c in np.flatnonzero((abs(mean) > tolerance) | (abs(std - 1) > tolerance)).tolist():
        have = f"mean {latent.mean[c] + mean[c] * latent.std[c]:.4g}, deviation {std[c] * latent.std[c]:.4g}"
        told = f"{latent.mean[c]:.4g} and {latent.std[c]:.4g}"
        yield Problem(
            "latent statistics",
            f"latent statistics: channel {c} has {have}, the manifest says {told} (tolerance "
            f"{tolerance:.2f} deviations); encode again",
        )


def _moments(tally: Tally) -> tuple[Vector, Vector]:
    """Mean and standard deviation of normalised latents by channel, [C] each; 0 and 1 match the manifest."""
    mean: Vector = tally.latent_sums / tally.latent_values
    return mean, np.sqrt(np.maximum(tally.latent_squares / tally.latent_values - mean * mean, 0))


def _class_table(tally: Tally) -> Table:
    labels: collections.Counter[int] = collections.Counter()
    names: dict[int, str] = {}
    for (label, name), count in tally.classes.items():
        labels[label] += count
        names[label] = name
    ordered = labels.most_common()
    counts = sorted(labels.values())
    rows = [
        ("classes", f"{len(labels):,}"),
        ("samples of a class", f"{counts[0]:,} to {counts[-1]:,}, median {counts[len(counts) // 2]:,}"),
        ("most", _classes(ordered[:5], names)),
        ("fewest", _classes(ordered[:-6:-1], names)),
    ]
    return Table("Classes", ("", ""), tuple(rows))


def _classes(counted: Sequence[tuple[int, int]], names: Mapping[int, str]) -> str:
    return ", ".join(f"{label} {names[label]}".strip() + f" ({count:,})" for label, count in counted)


def _counts(title: str, what: str, counts: collections.Counter[str]) -> Table:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rows = [(name, f"{count:,}") for name, count in ordered[:MAX_ROWS]]
    if len(ordered) > MAX_ROWS:
        rows.append((f"{len(ordered) - MAX_ROWS} more", f"{sum(count for _, count in ordered[MAX_ROWS:]):,}"))
    return Table(title, (what, "samples"), tuple(rows))


def _share(count: int, total: int) -> str:
    return f"{count:,} ({100 * count / total:.2f} %)"


def _list(values: Sequence[object]) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")
