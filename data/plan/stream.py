"""Plan + shards + packer -> packs of each global step, exact across resumes and numbers of ranks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from base.config import UserError
from base.objective import Batch
from data.packs.transfer import pinned
from data.plan.cursor import StreamCursor
from data.plan.mixture import Mixture
from data.plan.prefetch import Prefetch
from data.shards import Sample, ShardDataset


class Packer(Protocol):
    """Defines the length of samples, the budget of a pack, and how samples become a batch."""

    budget: int
    budget_key: str
    """The key of the config that sets `budget`, as people type it."""

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Length of every sample in the unit of `budget`, int64 [len(dataset)], >= 1."""

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> Batch:
        """Makes one pack of `samples`, each met in its epoch of `epochs`, for global step `step`. A pure function."""


@dataclass(frozen=True)
class _Step:
    """The prefetch thread's result for one step: the packs, and the cursors after these packs."""

    batches: tuple[Batch, ...]
    cursors: dict[int, dict[str, Any]]
    metrics: dict[str, float]


class PackStream:
    """One rank's view of the global sequence of packs; implements base.objective.BatchSource.

    Global step k takes pack k of every stream; rank r of R owns streams r, r + R, r + 2R, ... One thread reads and
    packs ahead; `next_step` raises its exceptions. Only one thread may use a PackStream. The constructor raises
    UserError: more ranks than streams, fewer samples than streams, or a sample over the budget.
    """

    def __init__(
        self,
        mixture: Mixture,
        packer: Packer,
        *,
        num_streams: int,
        seed: int,
        rank: int,
        world: int,
        prefetch_steps: int,
    ) -> None:
        assert 0 <= rank < world
        if world > num_streams:
            raise UserError(
                f"{world} ranks but num_streams = {num_streams}: num_streams must be at least as many "
                "as the most ranks the run may ever have"
            )
        self.num_streams = num_streams
        self._mixture = mixture
        self._packer = packer
        self._seed = seed
        self._prefetch_steps = prefetch_steps
        self._lengths = _lengths(mixture, packer)
        too_long = np.flatnonzero(self._lengths > packer.budget)
        if len(too_long):
            (sample,) = mixture.read(too_long[:1])
            raise UserError(
                f"{sample.where}: length {self._lengths[too_long[0]]} is over the pack's budget of "
                f"{packer.budget} ({len(too_long)} such samples); raise it or leave them out of the shards"
            )
        self._cursors = {stream: self._cursor(stream) for stream in range(rank, num_streams, world)}
        self._saved = self._snapshot()  # cursors after the last returned step; self._cursors run ahead
        self._metrics: dict[str, float] = {}
        self._prefetch: Prefetch[_Step] | None = None

    def num_steps(self, max_epochs: int) -> int:
        """Number of steps of a whole run in which no stream meets a sample more than `max_epochs` times.

        Plans all packs to count them (some seconds for 10 million samples); the number is equal on every rank. Raises
        UserError: there is not even one step.
        """
        steps = min(
            _num_packs(self._cursor(stream, only_counts=True), max_epochs)
            for stream in range(self.num_streams)
        )
        if steps == 0:
            raise UserError(
                f"{self._mixture.where}: too small for one pack of {self._packer.budget} in each of "
                f"{self.num_streams} streams within {max_epochs} epochs; lower num_streams or the pack's budget"
            )
        return steps

    def next_step(self) -> Sequence[Batch]:
        """This rank's packs of the next global step, in stream order. Raises what the prefetch thread raised."""
        if self._prefetch is None:
            for stream, cursor in self._cursors.items():
                cursor.load_state_dict(self._saved[stream])
            self._prefetch = Prefetch(self._steps(), self._prefetch_steps)
        begin = time.perf_counter()
        step = self._prefetch.next()
        self._saved = step.cursors
        self._metrics = {**step.metrics, "data_wait_s": time.perf_counter() - begin}
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """Cursors of this rank's streams after the last returned step; JSON-able, 2 KB a stream."""
        return {
            "fingerprint": self._mixture.fingerprint,
            "seed": self._seed,
            "num_streams": self.num_streams,
            "budget": self._packer.budget,
            "streams": {str(stream): cursor for stream, cursor in self._saved.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from the cursors of all streams, merged over the ranks that saved them.

        Raises UserError: another data set, seed, number of streams or budget; a missing stream; streams at different
        steps; samples that have other keys in this data set.
        """
        keys = {
            "fingerprint": "what data.shards, data.mixture or data.quarantine name",
            "seed": "data.seed",
            "num_streams": "data.num_streams",
            "budget": self._packer.budget_key,
        }
        for name, now in self.state_dict().items():
            if name != "streams" and state[name] != now:
                raise UserError(
                    f"resume: {keys[name]} was {_short(state[name])}, is {_short(now)}: the samples would come in "
                    "another order; set it back, or use a new run_dir"
                )
        cursors = state["streams"]
        missing = [stream for stream in range(self.num_streams) if str(stream) not in cursors]
        if missing:
            raise UserError(f"resume: the checkpoint lacks data stream {missing[0]}; take another checkpoint")
        if len({cursor["num_packs"] for cursor in cursors.values()}) != 1:
            raise UserError(
                "resume: the checkpoint's data streams stand at different steps; take another checkpoint"
            )
        self.close()
        for stream, cursor in self._cursors.items():
            cursor.load_state_dict(cursors[str(stream)])
        self._saved = self._snapshot()
        self._metrics = {}

    def metrics(self) -> Mapping[str, float]:
        """Ledger of the last returned step on this rank; empty before the first step.

        `samples`; `tokens`, in the budget's unit, before dropout; `fill`: tokens / budget, in (0, 1]; `samples_seen`:
        in this run so far, on this rank's streams; `samples_pending`: drawn and not packed yet; `epoch`: the furthest
        that any stream has reached; for a mixture also `epoch/NAME` and `samples/NAME`; `data_wait_s`: how long
        `next_step` waited.
        """
        return self._metrics

    def close(self) -> None:
        """Stops the prefetch thread. `next_step` starts it again after the last returned step."""
        if self._prefetch is not None:
            self._prefetch.close()
            self._prefetch = None

    def _snapshot(self) -> dict[int, dict[str, Any]]:
        return {stream: cursor.state_dict() for stream, cursor in self._cursors.items()}

    def _steps(self) -> Iterator[_Step]:
        """Yields steps without end. Runs in the prefetch thread, the only one to move the cursors meanwhile."""
        while True:
            batches: list[Batch] = []
            taken: list[npt.NDArray[np.int64]] = []
            for stream, cursor in self._cursors.items():
                step = cursor.num_packs
                epochs, addresses = cursor.next_pack()
                batch = self._packer.collate(
                    self._mixture.read(addresses),
                    step=step,
                    stream=stream,
                    epochs=epochs.tolist(),
                    seed=self._seed,
                )
                batches.append(pinned(batch))
                taken.append(addresses)
            yield _Step(tuple(batches), self._snapshot(), self._ledger(np.concatenate(taken)))

    def _ledger(self, taken: npt.NDArray[np.int64]) -> dict[str, float]:
        tokens = int(self._lengths[taken].sum())
        cursors = self._cursors.values()
        metrics = {
            "samples": float(len(taken)),
            "tokens": float(tokens),
            "fill": tokens / (self._packer.budget * len(cursors)),
            "samples_seen": float(sum(cursor.num_samples for cursor in cursors)),
            "samples_pending": float(sum(cursor.num_pending for cursor in cursors)),
            "epoch": float(max(max(cursor.epochs) for cursor in cursors)),
        }
        if len(self._mixture.members) > 1:
            counts, _ = np.histogram(taken, [*self._mixture.first])
            for number, member in enumerate(self._mixture.members):
                metrics[f"samples/{member.name}"] = float(counts[number])
                metrics[f"epoch/{member.name}"] = float(max(cursor.epochs[number] for cursor in cursors))
        return metrics

    def _cursor(self, stream: int, *, only_counts: bool = False) -> StreamCursor:
        return StreamCursor(
            self._mixture,
            self._lengths,
            budget=self._packer.budget,
            seed=self._seed,
            num_streams=self.num_streams,
            stream=stream,
            only_counts=only_counts,
        )


def _short(value: object) -> str:
    """A value for a message: a fingerprint's first 12 characters, or a whole number."""
    return str(value)[:12]


def _lengths(mixture: Mixture, packer: Packer) -> npt.NDArray[np.int64]:
    """Length of the sample at every address, int64 [len(mixture)]."""
    columns = [member.select(packer.lengths(member.dataset)) for member in mixture.members]
    return np.concatenate(columns).astype(np.int64, copy=False)


def _num_packs(cursor: StreamCursor, max_epochs: int) -> int:
    """Number of packs before the first pack with a sample of epoch number `max_epochs`."""
    while (cursor.next_pack()[0] < max_epochs).all():
        pass
    return cursor.num_packs - 1
