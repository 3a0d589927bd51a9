"""Plan + shards + packer -> packs of each global step, exact over resumes and rank counts (contract 2)."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data.cursor import StreamCursor
from data.shards import Sample, ShardDataset
from engine.config import ConfigError, UserError
from engine.objective import Batch


@dataclass(frozen=True)
class DataConfig:
    """Where batches come from and in which order."""

    shards: str  # directory with manifest.json
    num_streams: int = 8  # G: packs per global step; at least the most ranks this run may ever have
    seed: int = 0  # of the order and of every random choice about samples, noise and timesteps
    prefetch_steps: int = 2  # global steps read ahead by each rank's thread

    def __post_init__(self) -> None:
        for name in ("num_streams", "prefetch_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")


class Packer(Protocol):
    """Decides how long samples are, how much fits into a pack, and what a pack looks like."""

    budget: int

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        """Length of every sample in the unit of `budget`, int64 [len(dataset)], >= 1."""

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> Batch:
        """One pack of `samples`, met in `epochs`, for global step `step`; pure."""


@dataclass(frozen=True)
class _Step:
    """What the prefetch thread hands over: packs, and the cursors once these packs are consumed."""

    batches: tuple[Batch, ...]
    cursors: dict[int, dict[str, Any]]
    metrics: dict[str, float]


class PackStream:
    """One rank's view of the global sequence of packs; implements engine.objective.BatchSource.

    Global step k takes pack k of every stream; rank r of R owns streams r, r + R, r + 2R, ... One thread
    reads and packs ahead; an exception there is raised by `next_step`. Not to be used by several threads.
    Raises UserError when opened: more ranks than streams, fewer samples than streams, a sample over the
    budget.
    """

    def __init__(
        self,
        dataset: ShardDataset,
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
        self._dataset = dataset
        self._packer = packer
        self._seed = seed
        self._prefetch_steps = prefetch_steps
        self._lengths = packer.lengths(dataset)
        too_long = np.flatnonzero(self._lengths > packer.budget)
        if len(too_long):
            (sample,) = dataset.read([int(too_long[0])])
            raise UserError(
                f"{sample.where}: length {self._lengths[too_long[0]]} is over the pack's budget of "
                f"{packer.budget} ({len(too_long)} such samples); raise it or leave them out of the shards"
            )
        self._cursors = {
            stream: StreamCursor(
                dataset,
                self._lengths,
                budget=packer.budget,
                seed=seed,
                num_streams=num_streams,
                stream=stream,
            )
            for stream in range(rank, num_streams, world)
        }
        self._saved = self._snapshot()  # after the last returned step; self._cursors run ahead of it
        self._metrics: dict[str, float] = {}
        self._prefetch: _Prefetch | None = None

    def next_step(self) -> Sequence[Batch]:
        """This rank's packs of the next global step, in stream order."""
        if self._prefetch is None:
            for stream, cursor in self._cursors.items():
                cursor.load_state_dict(self._saved[stream])
            self._prefetch = _Prefetch(self._steps(), self._prefetch_steps)
        begin = time.perf_counter()
        step = self._prefetch.next()
        self._saved = step.cursors
        self._metrics = {**step.metrics, "data_wait_s": time.perf_counter() - begin}
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """Cursors of this rank's streams after the last returned step; JSON-able, 2 KB a stream."""
        return {
            "fingerprint": self._dataset.fingerprint,
            "seed": self._seed,
            "num_streams": self.num_streams,
            "streams": {str(stream): cursor for stream, cursor in self._saved.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the cursors of all streams, merged over the ranks that saved them, and continues after them.

        Raises UserError: another data set, seed or number of streams; a stream missing; streams at different
        steps; cursors whose samples have other keys here.
        """
        for name, now in self.state_dict().items():
            if name != "streams" and state[name] != now:
                raise UserError(
                    f"resume: the data's {name} was {state[name]}, is {now}; keep it or start a new run"
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
        """Of the last returned step on this rank; empty before the first.

        samples; tokens (in the budget's unit, nothing dropped); fill, tokens / budget in (0, 1]; epoch (the
        furthest any stream has read); data_wait_s, the time `next_step` waited for the thread.
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
        """Endless; runs in the prefetch thread, which alone moves the cursors meanwhile."""
        while True:
            batches: list[Batch] = []
            taken: list[int] = []
            for stream, cursor in self._cursors.items():
                step = cursor.num_packs
                epochs, indices = zip(*cursor.next_pack(), strict=True)
                samples = self._dataset.read(indices)
                batches.append(
                    self._packer.collate(samples, step=step, stream=stream, epochs=epochs, seed=self._seed)
                )
                taken += indices
            tokens = int(self._lengths[taken].sum())
            metrics = {
                "samples": float(len(taken)),
                "tokens": float(tokens),
                "fill": tokens / (self._packer.budget * len(batches)),
                "epoch": float(max(cursor.epoch for cursor in self._cursors.values())),
            }
            yield _Step(tuple(batches), self._snapshot(), metrics)


class _Prefetch:
    """Runs an iterator of steps in a thread, a few steps ahead; hands its exception to the consumer."""

    def __init__(self, steps: Iterator[_Step], depth: int) -> None:
        self._ready: queue.Queue[_Step | BaseException] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(steps,), name="prefetch", daemon=True)
        self._thread.start()

    def next(self) -> _Step:
        if self._failure is None:
            item = self._ready.get()
            if isinstance(item, _Step):
                return item
            self._failure = item
        raise self._failure

    def close(self) -> None:
        self._stopped.set()
        with contextlib.suppress(queue.Empty):
            while True:  # a thread that waits for room in the queue goes on and sees the flag
                self._ready.get_nowait()
        self._thread.join()

    def _run(self, steps: Iterator[_Step]) -> None:
        try:
            while not self._stopped.is_set():
                self._ready.put(next(steps))
        except BaseException as error:
            self._ready.put(error)
