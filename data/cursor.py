"""One virtual stream's place in the plan, and the choice of the next pack (contract 2)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from data.plan import epoch_order, window_samples
from data.shards import ShardDataset
from engine.config import UserError

LOOKAHEAD_SAMPLES = 128


class StreamCursor:
    """Walks the epochs of one stream and cuts them into packs.

    A pack takes samples in order while they fit; then, among the next 128, again and again the longest that
    still fits. What was passed over comes first in the next pack, so no sample waits for long and none is
    lost.
    """

    def __init__(
        self,
        dataset: ShardDataset,
        lengths: npt.NDArray[np.int64],
        *,
        budget: int,
        seed: int,
        num_streams: int,
        stream: int,
    ) -> None:
        self._dataset = dataset
        self._lengths = lengths
        self._budget = budget
        self._seed = seed
        self._num_streams = num_streams
        self._stream = stream
        self._epoch = 0  # of the next sample to be taken from the plan
        self._position = 0  # in that epoch's order
        self._pending: list[tuple[int, int]] = []  # (epoch, index) taken from the plan but not yet packed
        self._num_packs = 0
        self._order_hash = ""  # of the keys of all samples packed so far, in order
        self._order: npt.NDArray[np.int64] | None = None  # of self._epoch, made when first needed
        self._window = window_samples(len(dataset), num_streams)
        self._advised = 0  # samples of the order that the kernel was asked to read ahead

    def next_pack(self) -> list[tuple[int, int]]:
        """(epoch, index) of the samples of the next pack; never empty."""
        free = self._budget
        pack: list[tuple[int, int]] = []
        self._fill_pending()
        while self._pending:
            head = self._lengths[self._pending[0][1]]
            if head <= free:
                chosen = 0
            else:
                lengths = self._lengths[[index for _, index in self._pending]]
                fitting = np.where(lengths <= free, lengths, 0)
                chosen = int(np.argmax(fitting))  # the first of the longest
                if fitting[chosen] == 0:
                    break
            epoch_index = self._pending.pop(chosen)
            free -= int(self._lengths[epoch_index[1]])
            pack.append(epoch_index)
            if free == 0:
                break
            self._fill_pending()
        self._num_packs += 1
        self._order_hash = self._hash(self._order_hash, pack)
        return pack

    @property
    def num_packs(self) -> int:
        """Packs cut so far: the global step of the next one."""
        return self._num_packs

    @property
    def epoch(self) -> int:
        """Epoch of the next sample to be taken from the plan."""
        return self._epoch

    def state_dict(self) -> dict[str, Any]:
        """JSON-able place after the packs cut so far."""
        return {
            "num_packs": self._num_packs,
            "epoch": self._epoch,
            "position": self._position,
            "pending": [list(epoch_index) for epoch_index in self._pending],
            "pending_hash": self._hash("", self._pending),
            "order_hash": self._order_hash,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises UserError when the pending samples have other keys in this data set."""
        pending = [(int(epoch), int(index)) for epoch, index in state["pending"]]
        in_range = all(0 <= index < len(self._dataset) for _, index in pending)
        if not in_range or self._hash("", pending) != state["pending_hash"]:
            raise UserError(
                f"resume: data stream {self._stream} would continue with other samples than the run had; "
                f"the data set in {self._dataset.directory} was changed"
            )
        self._num_packs = int(state["num_packs"])
        self._epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._pending = pending
        self._order_hash = str(state["order_hash"])
        self._order = None
        self._advised = self._position // self._window * self._window

    def _fill_pending(self) -> None:
        while len(self._pending) < LOOKAHEAD_SAMPLES:
            if self._order is not None and self._position == len(self._order):
                self._epoch, self._position, self._advised, self._order = self._epoch + 1, 0, 0, None
            if self._order is None:
                self._order = epoch_order(
                    len(self._dataset),
                    self._dataset.fingerprint,
                    self._seed,
                    self._epoch,
                    self._num_streams,
                    self._stream,
                )
            if self._position >= self._advised:
                self._dataset.will_need(self._order[self._advised : self._advised + self._window])
                self._advised += self._window
            self._pending.append((self._epoch, int(self._order[self._position])))
            self._position += 1

    def _hash(self, before: str, pack: list[tuple[int, int]]) -> str:
        keys = self._dataset.key_hashes[[index for _, index in pack]].tobytes() if pack else b""
        return hashlib.sha256(before.encode() + keys).hexdigest()[:16]
