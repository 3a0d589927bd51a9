"""Examines a data set: whether it is whole, whether training can use it, and what it contains.

`data.shards.verification` checks bytes, `sample_checks` examines samples, `readiness` checks a launch. This module
joins their results.
"""

from __future__ import annotations

import collections
import contextlib
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from base.config import UserError, counted
from data.doctor.findings import Histogram, Table, histograms, notes, problems_of, tables
from data.doctor.readiness import Launch, readiness
from data.doctor.sample_checks import Choice, ShardInspector, Tally
from data.processes import over_shards
from data.shards import LatentInfo, Manifest, Sample, ShardDataset
from data.shards.verification import Problem, check_rejected, check_shard, leftovers, printable, read_sample

MAX_NAMED = 100_000  # problems kept; further ones are only counted, so that memory is bounded
MAX_LINES = 20  # problems that `Diagnosis.text` lists


@dataclass(frozen=True)
class Shown:
    """A sample that the page shows."""

    sample: Sample
    problems: tuple[str, ...]  # faults of this sample


@dataclass(frozen=True)
class Diagnosis:
    """The doctor's findings about a data set."""

    directory: str
    facts: tuple[tuple[str, str], ...]  # (name, value), such as the number of samples
    problems: tuple[Problem, ...]  # at most MAX_NAMED
    num_unnamed: int  # further problems, which are only counted
    notes: tuple[str, ...]  # remarks that need not stop a training
    tables: tuple[Table, ...]
    histograms: tuple[Histogram, ...]
    shown: tuple[Shown, ...]  # samples with problems, then a fixed random choice
    latent: LatentInfo | None

    @property
    def num_problems(self) -> int:
        """Number of all problems."""
        return len(self.problems) + self.num_unnamed

    @property
    def verdict(self) -> str:
        """The result in one line."""
        if not self.num_problems:
            return "no problems"
        kinds = collections.Counter(problem.kind for problem in self.problems).most_common()
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds)
        more = f", {self.num_unnamed} more not listed" if self.num_unnamed else ""
        return f"{counted(self.num_problems, 'problem')} ({listed}{more})"

    def text(self) -> str:
        """The diagnosis for a terminal, problems first."""
        lines = [f"{self.directory}: {self.verdict}"]
        lines += [f"  {problem.text}" for problem in self.problems[:MAX_LINES]]
        if self.num_problems > MAX_LINES:
            lines.append(f"  ... {self.num_problems - MAX_LINES} more")
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"{name}: {value}" for name, value in self.facts]
        for table in self.tables:
            lines += ["", f"{table.title}", *("  " + line for line in table.lines())]
        lines += ["", *(f"{histogram.title}: {histogram.summary}" for histogram in self.histograms)]
        return "\n".join(printable(line) for line in lines).rstrip()

    def lost(self) -> tuple[Mapping[str, str], Mapping[str, str]]:
        """Samples (by key) and shards (by name) that training must leave out, each with its first reason.

        Raises UserError: there are too many problems to name all.
        """
        if self.num_unnamed:
            raise UserError(
                f"{self.directory}: {self.num_problems} problems are too many for a quarantine; make it again"
            )
        keys: dict[str, str] = {}
        shards: dict[str, str] = {}
        for problem in self.problems:
            if problem.lost and problem.key:
                keys.setdefault(problem.key, problem.text)
            elif problem.lost:
                shards.setdefault(problem.shard, problem.text)
        return keys, shards


def diagnose(
    directory: str | Path, *, num_processes: int = 1, launch: Launch | None = None, num_shown: int = 24
) -> Diagnosis:
    """Reads every byte of a finished data set twice, for checksums and for its content.

    `launch`: settings of a run, for which readiness is checked. Raises UserError: no data set, a damaged manifest, or a
    budget in the wrong unit.
    """
    directory = Path(directory)
    manifest = Manifest.read(directory)
    if launch is not None:
        launch.budget(manifest.latent)  # raises before the work begins
    found = list(check_rejected(directory, manifest))
    tally, num_unnamed = Tally(), 0
    work = functools.partial(_look_at_shard, directory, manifest, num_shown)
    num_samples = [entry.num_samples for entry in manifest.shards]
    for problems, part in over_shards(work, num_samples, num_processes, "doctor"):
        tally.merge(part, num_shown)
        num_unnamed += max(0, len(found) + len(problems) - MAX_NAMED)
        found += problems[: MAX_NAMED - len(found)]
    remarks = [*leftovers(directory, manifest), *notes(tally)]
    found += problems_of(tally, manifest.latent)
    facts = _facts(manifest)
    tabled = tables(tally, manifest.latent)
    if launch is not None:
        try:
            ready = readiness(ShardDataset.open(directory), launch)
        except UserError as error:
            remarks.append(f"launch not looked at: {error}")
        else:
            found += [Problem("launch", f"launch: {reason}") for reason in ready.problems]
            remarks += ready.notes
            tabled.insert(0, Table("Launch", ("", ""), ready.facts))
    return Diagnosis(
        directory=str(directory),
        facts=facts,
        problems=tuple(found),
        num_unnamed=num_unnamed,
        notes=tuple(remarks),
        tables=tuple(tabled),
        histograms=tuple(histograms(tally)),
        shown=tuple(_show(directory, manifest, found, tally.chosen, num_shown)),
        latent=manifest.latent,
    )


def _look_at_shard(
    directory: Path, manifest: Manifest, num_shown: int, shard: int
) -> tuple[list[Problem], Tally]:
    inspector = ShardInspector(shard, manifest.latent, num_shown)
    problems = check_shard(directory, manifest, shard, inspector)
    return problems, inspector.finish()


def _facts(manifest: Manifest) -> tuple[tuple[str, str], ...]:
    num_bytes = sum(entry.num_bytes for entry in manifest.shards)
    facts = [
        (
            "samples",
            f"{manifest.num_samples:,} in {len(manifest.shards):,} shards, {num_bytes / 1e9:,.3f} GB",
        ),
        ("rejected", f"{manifest.num_rejected:,}"),
        ("source", manifest.source),
        ("fingerprint", manifest.fingerprint),
    ]
    latent = manifest.latent
    if latent is not None:
        kinds = "mean and log variance" if latent.has_logvar else "mean"
        shape = "x".join(map(str, latent.shape))
        views = counted(latent.num_views, "view")
        facts.append(("latents", f"{shape} {latent.dtype}, {views}, {kinds}"))
        facts.append(("autoencoder", latent.tokenizer_fingerprint))
        facts.append(("text tokenizer", latent.text_tokenizer_fingerprint or "none, class labels"))
    return tuple(facts)


def _show(
    directory: Path, manifest: Manifest, problems: list[Problem], chosen: list[Choice], num_shown: int
) -> Iterator[Shown]:
    """Yields the first samples with problems that can be read, then the chosen samples."""
    shards = {entry.name: shard for shard, entry in enumerate(manifest.shards)}
    reasons: dict[tuple[int, int], list[str]] = {}
    for problem in problems:
        if problem.position is not None:
            reasons.setdefault((shards[problem.shard], problem.position), []).append(problem.text)
    bad = list(reasons)[:num_shown]
    for shard, position in dict.fromkeys([*bad, *((shard, position) for _, shard, position in chosen)]):
        with contextlib.suppress(UserError):  # the sample's bytes are damaged
            sample = read_sample(directory, manifest, shard, position)
            yield Shown(sample, tuple(reasons.get((shard, position), ())))
