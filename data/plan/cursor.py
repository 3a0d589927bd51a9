"""One virtual stream's place in the plan, and the choice of the next pack (contract 2)."""

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
CHUNK_DRAWS = 2048  # rows drawn from the plan at a time; any number gives the same packs

# Lines of the table of samples that were drawn from the plan and not yet packed.
EPOCH, ADDRESS, LENGTH, SET, PLACE, DRAW = range(6)  # PLACE: in the set's epoch; DRAW: number in the stream
Rows = npt.NDArray[np.int64]  # [6, n]


class StreamCursor:
    """Walks the epochs of one stream and cuts them into packs.

    Every draw takes the next sample of one set of the mixture, chosen by weight; each set has its own epochs. A pack
    takes samples in order while they fit; then, among the next 128, again and again the longest that still fits. What
    was passed over comes first in the next pack, so no sample waits for long and none is lost.
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
        self._only_counts = only_counts  # nothing is read, and no state is saved
        self._walks = [
            _SetWalk(mixture, number, seed, num_streams, stream, read_ahead=not only_counts)
            for number in range(len(mixture.members))
        ]
        self._num_packs = 0
        self._num_samples = 0
        self._num_draws = 0  # up to the furthest sample packed so far
        self._order_hash = ""  # of the keys of all samples packed so far, in order
        self._rows: Rows = np.empty((6, 0), np.int64)  # in order of draw; begins with what was passed over
        self._next_draw = 0  # of the rows not yet drawn

    def next_pack(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Epochs and addresses of the samples of the next pack, int64 [n] each, n >= 1."""
        begin, free = self._fitting_in_order()
        picked: list[int] = []  # out of order, counted from `begin`
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
        """Packs cut so far: the global step of the next one."""
        return self._num_packs

    @property
    def num_samples(self) -> int:
        """Samples packed so far."""
        return self._num_samples

    @property
    def num_pending(self) -> int:
        """Samples that were passed over and come first in the next pack."""
        return len(self._pending())

    @property
    def epochs(self) -> list[int]:
        """Of each set, the epoch this stream has reached in the plan."""
        return [epoch for epoch, _ in self._places()]

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place after the packs cut so far."""
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
        """Raises UserError when the pending samples have other keys in this data set."""
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
        self._rows = np.full((6, len(pending)), -1, np.int64)  # their set and place were accounted for
        self._rows[EPOCH], self._rows[ADDRESS] = pending[:, 0], addresses
        self._rows[LENGTH] = self._lengths[addresses]

    def _fitting_in_order(self) -> tuple[int, int]:
        """How many rows fit one after the other, and the room that is left; the window after them is drawn."""
        num_rows = LOOKAHEAD_SAMPLES
        while True:
            self._draw_rows(num_rows)
            ends = np.cumsum(self._rows[LENGTH])
            num_in_order = int(np.searchsorted(ends, self._budget, side="right"))
            if num_in_order + LOOKAHEAD_SAMPLES <= self._rows.shape[1]:
                return num_in_order, self._budget - int(ends[num_in_order - 1])
            num_rows = num_in_order + LOOKAHEAD_SAMPLES

    def _draw_rows(self, num_rows: int) -> None:
        """Makes sure that there are at least `num_rows` rows."""
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
        """Takes the first rows and those picked after them out of the table."""
        if picked:
            passed_over = np.delete(np.arange(max(picked) + 1), picked)
            rest = begin + max(picked) + 1
            begin = rest - len(passed_over)  # what was passed over moves up to the rest
            self._rows[:, begin:rest] = self._rows[:, rest - max(picked) - 1 + passed_over]
        self._rows = self._rows[:, begin:]

    def _places(self) -> list[tuple[int, int]]:
        """Of each set, (epoch, position) of the first sample that is neither packed nor passed over."""
        rows = self._rows[:, self._pending().shape[1] :]
        places = []
        for number, walk in enumerate(self._walks):
            mine = np.flatnonzero(rows[SET] == number)
            row = rows[:, mine[0]].tolist() if len(mine) else None
            places.append((walk.epoch, walk.position) if row is None else (row[EPOCH], row[PLACE]))
        return places

    def _pending(self) -> Rows:
        """Rows that were passed over."""
        return self._rows[:, : np.searchsorted(self._rows[DRAW], self._num_draws)]

    def _hash(self, before: str, addresses: npt.NDArray[np.int64]) -> str:
        keys = self._mixture.key_hashes[addresses].tobytes()
        return hashlib.sha256(before.encode() + keys).hexdigest()[:16]


class _SetWalk:
    """One stream's way through the epochs of one set."""

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
        """Continues at `position` of the stream's share of `epoch`; one past its end is the next one's begin."""
        self.epoch = epoch
        self.position = position
        self._order: npt.NDArray[np.int64] | None = None  # of self.epoch, made when first needed
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
