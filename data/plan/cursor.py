"""One virtual stream's position in the plan, and the choice of its next pack."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from base.config import UserError
from data.plan.mixture import Mixture
from data.plan.plan import epoch_order, set_draws, window_samples

LOOKAHEAD_SAMPLES = 128
CHUNK_DRAWS = 2048  # rows drawn from the plan at a time; the packs do not depend on it

# Rows of the table of samples that are drawn from the plan and not packed yet.
EPOCH, ADDRESS, LENGTH, SET, PLACE, DRAW = range(6)  # PLACE: in the set's epoch; DRAW: number in the stream
Rows = npt.NDArray[np.int64]  # [6, n]


class StreamCursor:
    """Walks the epochs of one stream and cuts them into packs.

    Every draw chooses a set of the mixture by weight and takes the set's next sample; each set has its own epochs. A
    pack takes samples in order while they fit. Then it repeatedly takes the longest sample that still fits among the
    next 128. Samples that were passed over come first in the next pack, so none waits for long and none is lost.
    """

    def __init__(
        self,
        mixture: Mixture,
        lengths: npt.NDArray[np.int64],
        *,
        budget: int,
        seed: int,
        num_streams: int,
        stream: int,
        only_counts: bool = False,
    ) -> None:
        self._mixture = mixture
        self._lengths = lengths
        self._budget = budget
        self._seed = seed
        self._stream = stream
        self._only_counts = only_counts  # the caller only counts packs: no read-ahead, no state
        self._walks = [
            _SetWalk(mixture, number, seed, num_streams, stream, read_ahead=not only_counts)
            for number in range(len(mixture.members))
        ]
        self._num_packs = 0
        self._num_samples = 0
        self._num_draws = 0  # draws up to and including the furthest packed sample
        self._order_hash = ""  # hash of the keys of all packed samples, in order
        self._rows: Rows = np.empty((6, 0), np.int64)  # in order of draw; samples passed over come first
        self._next_draw = 0  # number of the next draw

    def next_pack(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Epochs and addresses of the samples of the next pack, int64 [n] each, n >= 1."""
        begin, free = self._fitting_in_order()
        picked: list[int] = []  # samples taken out of order, counted from `begin`
        while free > 0:
            end = begin + LOOKAHEAD_SAMPLES + len(picked)
            self._draw_rows(end)
            lengths = self._rows[LENGTH, begin:end].copy()
            lengths[picked] = 0
            lengths[lengths > free] = 0
            best = int(lengths.argmax())  # the first of the longest that fit
            if lengths[best] == 0:
                break
            free -= int(lengths[best])
            picked.append(best)
        others = self._rows[:, [begin + place for place in picked]]
        pack = np.concatenate([self._rows[:, :begin], others], axis=1)
        self._num_draws = max(self._num_draws, int(pack[DRAW].max()) + 1)
        self._remove(begin, picked)
        self._num_packs += 1
        self._num_samples += pack.shape[1]
        if not self._only_counts:
            self._order_hash = self._hash(self._order_hash, pack[ADDRESS])
        return pack[EPOCH], pack[ADDRESS]

    @property
    def num_packs(self) -> int:
        """Number of packs cut so far, which is the global step of the next pack."""
        return self._num_packs

    @property
    def num_samples(self) -> int:
        """Number of samples packed so far."""
        return self._num_samples

    @property
    def num_pending(self) -> int:
        """Number of samples that were passed over and come first in the next pack."""
        return int(self._pending().shape[1])

    @property
    def epochs(self) -> list[int]:
        """The epoch that this stream has reached in each set."""
        return [epoch for epoch, _ in self._places()]

    def state_dict(self) -> dict[str, Any]:
        """The position after the packs cut so far, JSON-able."""
        pending = self._pending()
        return {
            "num_packs": self._num_packs,
            "num_samples": self._num_samples,
            "num_draws": self._num_draws,
            "places": [list(place) for place in self._places()],
            "pending": pending[[EPOCH, ADDRESS]].T.tolist(),
            "pending_hash": self._hash("", pending[ADDRESS]),
            "order_hash": self._order_hash,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues at a saved position. Raises UserError: the pending samples have other keys in this data set."""
        pending = np.array(state["pending"], np.int64).reshape(-1, 2)
        addresses = pending[:, 1]
        in_range = ((addresses >= 0) & (addresses < len(self._mixture))).all()
        if not in_range or self._hash("", addresses) != state["pending_hash"]:
            raise UserError(
                f"resume: data stream {self._stream} would continue with other samples than the run had; "
                f"the data set in {self._mixture.where} was changed"
            )
        self._num_packs = int(state["num_packs"])
        self._num_samples = int(state["num_samples"])
        self._num_draws = self._next_draw = int(state["num_draws"])
        self._order_hash = str(state["order_hash"])
        for walk, (epoch, position) in zip(self._walks, state["places"], strict=True):
            walk.go_to(int(epoch), int(position))
        self._rows = np.full((6, len(pending)), -1, np.int64)  # the saved places already count them
        self._rows[EPOCH], self._rows[ADDRESS] = pending[:, 0], addresses
        self._rows[LENGTH] = self._lengths[addresses]

    def _fitting_in_order(self) -> tuple[int, int]:
        """Number of rows that fit in order, and the room left after them. Draws the lookahead after these rows, too."""
        num_rows = LOOKAHEAD_SAMPLES
        while True:
            self._draw_rows(num_rows)
            ends = np.cumsum(self._rows[LENGTH])
            num_in_order = int(np.searchsorted(ends, self._budget, side="right"))
            if num_in_order + LOOKAHEAD_SAMPLES <= self._rows.shape[1]:
                return num_in_order, self._budget - int(ends[num_in_order - 1])
            num_rows = num_in_order + LOOKAHEAD_SAMPLES

    def _draw_rows(self, num_rows: int) -> None:
        """Draws from the plan until the table has at least `num_rows` rows."""
        while self._rows.shape[1] < num_rows:
            draws = np.arange(self._next_draw, self._next_draw + CHUNK_DRAWS)
            rows = np.empty((6, CHUNK_DRAWS), np.int64)
            rows[DRAW] = draws
            rows[SET] = self._sets_of(draws)
            for number, walk in enumerate(self._walks):
                mine = np.flatnonzero(rows[SET] == number)
                rows[EPOCH, mine], rows[ADDRESS, mine], rows[PLACE, mine] = walk.take(len(mine))
            rows[ADDRESS] += self._mixture.first[rows[SET]]
            rows[LENGTH] = self._lengths[rows[ADDRESS]]
            self._rows = np.concatenate([self._rows, rows], axis=1)
            self._next_draw += CHUNK_DRAWS

    def _sets_of(self, draws: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        if len(self._walks) == 1:
            return np.zeros(len(draws), np.int64)
        weights = [member.weight for member in self._mixture.members]
        return set_draws(draws, weights, self._mixture.fingerprint, self._seed, self._stream)

    def _remove(self, begin: int, picked: list[int]) -> None:
        """Removes the first `begin` rows and the rows picked after them from the table."""
        if picked:
            passed_over = np.delete(np.arange(max(picked) + 1), picked)
            rest = begin + max(picked) + 1
            begin = rest - len(passed_over)  # rows passed over move up to the rest
            self._rows[:, begin:rest] = self._rows[:, rest - max(picked) - 1 + passed_over]
        self._rows = self._rows[:, begin:]

    def _places(self) -> list[tuple[int, int]]:
        """For each set, (epoch, position) of the first sample that is neither packed nor passed over."""
        rows = self._rows[:, self._pending().shape[1] :]
        places = []
        for number, walk in enumerate(self._walks):
            mine = np.flatnonzero(rows[SET] == number)
            row = rows[:, mine[0]].tolist() if len(mine) else None
            places.append((walk.epoch, walk.position) if row is None else (row[EPOCH], row[PLACE]))
        return places

    def _pending(self) -> Rows:
        """The rows that were passed over."""
        return self._rows[:, : np.searchsorted(self._rows[DRAW], self._num_draws)]

    def _hash(self, before: str, addresses: npt.NDArray[np.int64]) -> str:
        keys = self._mixture.key_hashes[addresses].tobytes()
        return hashlib.sha256(before.encode() + keys).hexdigest()[:16]


class _SetWalk:
    """Walks one stream through the epochs of one set."""

    def __init__(
        self, mixture: Mixture, number: int, seed: int, num_streams: int, stream: int, *, read_ahead: bool
    ) -> None:
        self._mixture = mixture
        self._number = number
        self._plan = (seed, num_streams, stream)
        self._read_ahead = read_ahead
        self._window = window_samples(len(mixture.members[number]), num_streams)
        self.go_to(0, 0)

    def go_to(self, epoch: int, position: int) -> None:
        """Continues at `position` of the stream's share of `epoch`; its end equals the begin of the next epoch."""
        self.epoch = epoch
        self.position = position
        self._order: npt.NDArray[np.int64] | None = None  # order of self.epoch, computed on first use
        self._announced = position // self._window * self._window

    def take(self, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Epochs, sample numbers and places in the epoch of the next `count` samples, int64 [count] each."""
        pieces: list[npt.NDArray[np.int64]] = [np.empty((3, 0), np.int64)]
        while count > 0:
            order = self._epoch_order()
            if self.position == len(order):
                self.go_to(self.epoch + 1, 0)
                continue
            end = min(self.position + count, len(order))
            while self._read_ahead and self._announced < end:
                self._mixture.will_need(self._number, order[self._announced : self._announced + self._window])
                self._announced += self._window
            places = np.arange(self.position, end)
            pieces.append(np.stack([np.full(len(places), self.epoch), order[places], places]))
            count -= len(places)
            self.position = end
        epochs, indices, places = np.concatenate(pieces, axis=1)
        return epochs, indices, places

    def _epoch_order(self) -> npt.NDArray[np.int64]:
        if self._order is None:
            member = self._mixture.members[self._number]
            seed, num_streams, stream = self._plan
            self._order = epoch_order(len(member), member.fingerprint, seed, self.epoch, num_streams, stream)
        return self._order
