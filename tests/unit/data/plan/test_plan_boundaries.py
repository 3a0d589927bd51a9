"""Contract 2 at its boundaries: packs that are exactly full, the packer's lookahead, as many samples as streams, the
last block and the end of an epoch, and a resume exactly there.
"""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from base.config import UserError
from data.plan.cursor import CHUNK_DRAWS, LOOKAHEAD_SAMPLES, StreamCursor
from data.plan.mixture import Member, Mixture
from data.plan.plan import BLOCK_SAMPLES, WINDOW_BLOCKS, epoch_order, set_draws, window_samples
from data.plan.stream import PackStream, _num_packs

BUDGET = 100
FINGERPRINT = "f"


class Announced(SimpleNamespace):
    """As much of a data set as the plan asks for; it writes down what is announced."""

    def __init__(self, lengths: list[int]) -> None:
        super().__init__(
            num_image_tokens=np.array(lengths),
            key_hashes=np.arange(len(lengths), dtype=np.uint64),
            announced=[],
            directory="set",
            fingerprint=FINGERPRINT,
        )

    def __len__(self) -> int:
        return len(self.num_image_tokens)

    def will_need(self, indices: Any) -> None:
        self.announced += indices.tolist()

    def read(self, indices: Any) -> list[Any]:
        return [SimpleNamespace(key=str(index), where=f"shard: sample '{index}'") for index in indices]


def mixture_of(lengths: list[int]) -> Mixture:
    return Mixture([Member("", Announced(lengths), fingerprint=FINGERPRINT)])  # type: ignore[arg-type]


def cursor_of(lengths: list[int], num_streams: int = 1, stream: int = 0, **change: Any) -> StreamCursor:
    settings_ = {"budget": BUDGET, "seed": 3, "num_streams": num_streams, "stream": stream, **change}
    return StreamCursor(mixture_of(lengths), np.array(lengths), **settings_)


def planned(lengths: list[int], num_streams: int, stream: int, num_epochs: int) -> list[tuple[int, int]]:
    """(epoch, address) of a stream's samples in order."""
    return [
        (epoch, int(index))
        for epoch in range(num_epochs)
        for index in epoch_order(len(lengths), FINGERPRINT, 3, epoch, num_streams, stream)
    ]


def packed_by_rule(
    plan: list[tuple[int, int]], lengths: list[int], num_packs: int
) -> list[list[tuple[int, int]]]:
    """In order while they fit; then, among the next 128 not taken, the first of the longest that still fit."""
    plan, packs = list(plan), []
    for _ in range(num_packs):
        pack, free = [], BUDGET
        while lengths[plan[0][1]] <= free:
            free -= lengths[plan[0][1]]
            pack.append(plan.pop(0))
        while fitting := [item for item in plan[:LOOKAHEAD_SAMPLES] if lengths[item[1]] <= free]:
            best = max(fitting, key=lambda item: lengths[item[1]])
            plan.remove(best)
            free -= lengths[best[1]]
            pack.append(best)
        packs.append(pack)
    return packs


def next_packs(cursor: StreamCursor, number: int) -> list[list[tuple[int, int]]]:
    found = []
    for _ in range(number):
        epochs, addresses = cursor.next_pack()
        found.append(list(zip(epochs.tolist(), addresses.tolist(), strict=True)))
    return found


def stream_of(lengths: list[int], num_streams: int, rank: int = 0, world: int = 1) -> PackStream:
    packer: Any = SimpleNamespace(
        budget=BUDGET,
        budget_key="the budget",
        lengths=lambda dataset: dataset.num_image_tokens,
        collate=lambda samples, **_: [sample.key for sample in samples],
    )
    return PackStream(
        mixture_of(lengths), packer, num_streams=num_streams, seed=3, rank=rank, world=world, prefetch_steps=1
    )


lengths_of_samples = st.lists(
    st.one_of(st.sampled_from([BUDGET, BUDGET - 4, 4, BUDGET // 2]), st.integers(4, BUDGET)),
    min_size=10,
    max_size=80,
)


@settings(max_examples=30, deadline=None)
@given(lengths_of_samples, st.integers(1, 3), st.integers(0, 12))
def test_any_lengths_are_packed_by_the_rule_and_go_on_after_a_resume_anywhere(
    lengths: list[int], num_streams: int, stop: int
) -> None:
    """Samples as long as the pack among them; every stop, so also the ends of epochs."""
    for stream in range(num_streams):
        plan = planned(lengths, num_streams, stream, 150)  # 12 packs of 25 samples, and the lookahead
        expected = packed_by_rule(plan, lengths, 12)
        cursor = cursor_of(lengths, num_streams, stream)
        found = next_packs(cursor, stop)
        state = json.loads(json.dumps(cursor.state_dict()))
        taken = sum(map(len, found))
        assert state["num_samples"] == taken and state["num_packs"] == stop
        assert state["num_draws"] == taken + len(state["pending"])
        assert cursor.num_pending == len(state["pending"])
        resumed = cursor_of(lengths, num_streams, stream)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        for rest in (copy.copy(cursor), resumed):
            assert found + next_packs(rest, 12 - stop) == expected


@pytest.mark.parametrize("streams", [1, 3])
def test_a_sample_as_long_as_the_pack_has_one_to_itself_and_one_longer_is_refused(streams: int) -> None:
    full = [BUDGET] * 6
    stream = stream_of(full, streams)
    for number in range(streams):
        packs = next_packs(stream._cursor(number), 4)
        assert packs == [[item] for item in planned(full, streams, number, 4)[:4]]
    with pytest.raises(UserError, match=r"sample '4': length 101 is over .* 100 \(1 such samples\)"):
        stream_of([BUDGET] * 4 + [BUDGET + 1, BUDGET], streams)


def plan_with_a_filler_at(place: int) -> tuple[list[int], list[int]]:
    """Lengths of 1,000 samples whose plan is one of 60, samples of 41, and at `place` after it one of 40."""
    order = epoch_order(1000, FINGERPRINT, 3, 0, 1, 0).tolist()
    lengths = [41] * 1000
    lengths[order[0]], lengths[order[1 + place]] = 60, 40
    return lengths, order


def test_the_lookahead_ends_exactly_after_its_last_sample() -> None:
    """The samples that follow those in order are numbered 0 to 127; number 128 is not seen."""
    for place, is_found in ((0, True), (LOOKAHEAD_SAMPLES - 1, True), (LOOKAHEAD_SAMPLES, False)):
        lengths, order = plan_with_a_filler_at(place)
        ((_, *rest),) = next_packs(cursor_of(lengths), 1)
        assert rest == ([(0, order[1 + place])] if is_found else [])


def test_each_sample_taken_out_of_order_moves_the_lookahead_on_by_one() -> None:
    order = epoch_order(1000, FINGERPRINT, 3, 0, 1, 0).tolist()
    for place, is_found in ((LOOKAHEAD_SAMPLES, True), (LOOKAHEAD_SAMPLES + 1, False)):
        lengths = [41] * 1000
        lengths[order[0]], lengths[order[1 + 5]], lengths[order[1 + place]] = 60, 30, 10
        ((_, *rest),) = next_packs(cursor_of(lengths), 1)
        assert rest == [(0, order[6])] + ([(0, order[1 + place])] if is_found else [])


def test_the_last_token_of_a_pack_is_filled_and_none_after_it() -> None:
    """Room for one token: a sample of one fits, a sample of two does not."""
    order = epoch_order(1000, FINGERPRINT, 3, 0, 1, 0).tolist()
    for filler in (1, 2):
        lengths = [41] * 1000
        lengths[order[0]], lengths[order[1 + 7]] = BUDGET - 1, filler
        (pack,) = next_packs(cursor_of(lengths), 1)
        assert pack == [(0, order[0])] + [(0, order[8])] * (filler == 1)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_samples_around_the_size_of_a_chunk_of_draws(extra: int) -> None:
    """An epoch that ends with the chunk, one draw before it, and one after it."""
    lengths = [30 + number % 5 for number in range(CHUNK_DRAWS + extra)]
    plan = planned(lengths, 1, 0, 3)
    num_packs = 2 * len(lengths) // 3
    assert next_packs(cursor_of(lengths), num_packs) == packed_by_rule(plan, lengths, num_packs)


@pytest.mark.parametrize("num_streams", [1, 2, 8])
def test_as_many_samples_as_streams_feed_each_one_and_one_less_is_refused(num_streams: int) -> None:
    for extra in (0, 1):
        streams = [
            epoch_order(num_streams + extra, FINGERPRINT, 0, 0, num_streams, stream).tolist()
            for stream in range(num_streams)
        ]
        assert sorted(map(len, streams)) == [1] * (num_streams - extra) + [2] * extra
        assert sorted(itertools.chain.from_iterable(streams)) == list(range(num_streams + extra))
    for stream in range(num_streams):
        packs = next_packs(cursor_of([40] * num_streams, num_streams, stream), 3)
        assert [[epoch for epoch, _ in pack] for pack in packs] == [[0, 1], [2, 3], [4, 5]]
    if num_streams > 1:
        with pytest.raises(UserError, match=f"{num_streams - 1} samples cannot feed num_streams"):
            cursor_of([40] * (num_streams - 1), num_streams)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 40), st.integers(-2, 2), st.integers(0, 3))
def test_blocks_of_every_epoch_are_dealt_in_turn_up_to_the_last_one(
    num_streams: int, blocks: int, extra: int, epoch: int
) -> None:
    """Full, one sample more, one less: blocks stay whole, and no stream has two blocks more than another."""
    num_samples = max(blocks * BLOCK_SAMPLES + extra, num_streams)
    size = min(BLOCK_SAMPLES, num_samples // num_streams)
    assert window_samples(num_samples, num_streams) == WINDOW_BLOCKS * size
    owners: dict[int, int] = {}
    counts = []
    for stream in range(num_streams):
        order = epoch_order(num_samples, FINGERPRINT, 0, epoch, num_streams, stream)
        mine = set((order // size).tolist())
        counts.append(len(mine))
        for block in mine:
            assert owners.setdefault(block, stream) == stream
        assert len(order) == sum(min(size, num_samples - block * size) for block in mine)
    assert len(owners) == -(-num_samples // size) and max(counts) - min(counts) <= 1


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_every_sample_is_announced_once_before_it_is_taken(extra: int) -> None:
    """Epochs of a whole window of the shuffle, one sample less and one more; from the start and after a resume."""
    size = WINDOW_BLOCKS * BLOCK_SAMPLES + extra
    lengths = [BUDGET] * size
    cursor = cursor_of(lengths)
    dataset: Any = cursor._mixture.members[0].dataset
    first = [index for _, index in planned(lengths, 1, 0, 2)]
    for number in range(size + 1):
        ((_, index),) = next_packs(cursor, 1)[0:1][0]
        assert index in dataset.announced, number
    announced = dataset.announced[: 2 * size]
    assert sorted(announced[:size]) == list(range(size))
    assert announced[:size] == first[:size]
    resumed = cursor_of(lengths)
    resumed.load_state_dict(cursor.state_dict())
    again: Any = resumed._mixture.members[0].dataset
    next_packs(resumed, 1)
    assert again.announced[:size] == first[size : 2 * size]


def test_no_window_is_announced_before_a_sample_of_it_is_drawn() -> None:
    """A chunk of draws ends exactly with the first of three windows."""
    window = WINDOW_BLOCKS * BLOCK_SAMPLES
    assert window == CHUNK_DRAWS
    cursor = cursor_of([BUDGET] * 3 * window)
    next_packs(cursor, 1)
    dataset: Any = cursor._mixture.members[0].dataset
    assert len(dataset.announced) == window


def test_each_set_of_a_mixture_announces_its_own_samples() -> None:
    """Addresses number the samples of all sets; a data set knows its own numbers, with those that are left out."""
    kept = np.arange(1, 200, 2)
    members: list[Any] = [
        Member("all", Announced([50] * 300), fingerprint="a"),
        Member("odd", Announced([50] * 200), kept=kept, fingerprint="b"),
    ]
    mixture = Mixture(members)
    cursor = StreamCursor(mixture, np.full(400, 50), budget=BUDGET, seed=3, num_streams=1, stream=0)
    taken = {address for pack in next_packs(cursor, 60) for _, address in pack}
    of_all = {address for address in taken if address < 300}
    of_odd = {int(kept[address - 300]) for address in taken if address >= 300}
    assert of_all and of_all <= set(members[0].dataset.announced) <= set(range(300))
    assert of_odd and of_odd <= set(members[1].dataset.announced) <= set(kept.tolist())


def test_a_resume_exactly_at_the_end_of_an_epoch_begins_the_next_one() -> None:
    """The position `end of epoch 0` and `begin of epoch 1` are one."""
    lengths = [BUDGET] * 5
    cursor = cursor_of(lengths)
    next_packs(cursor, 5)
    state = cursor.state_dict()
    assert state["places"] in ([[0, 5]], [[1, 0]]) and state["pending"] == []
    expected = [[item] for item in planned(lengths, 1, 0, 3)[5:15]]
    for places in ([[0, 5]], [[1, 0]]):
        resumed = cursor_of(lengths)
        resumed.load_state_dict({**state, "places": places})
        assert next_packs(resumed, 10) == expected


def test_the_steps_of_n_epochs_end_exactly_where_a_sample_would_come_again() -> None:
    """Five full packs an epoch: `max_epochs` of 2 is ten packs, neither nine nor eleven."""
    for max_epochs in (1, 2, 3):
        cursor = cursor_of([BUDGET] * 5, only_counts=True)
        assert _num_packs(cursor, max_epochs) == 5 * max_epochs
    assert _num_packs(cursor_of([50] * 5, only_counts=True), 1) == 2  # the third pack would begin epoch 1


def test_a_run_of_exactly_one_step_is_one_and_of_none_is_refused() -> None:
    for num_streams in (1, 3):
        assert stream_of([BUDGET] * num_streams, num_streams).num_steps(1) == 1
        with pytest.raises(UserError, match="too small for one pack of 100"):
            stream_of([BUDGET // 2] * num_streams, num_streams).num_steps(1)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_the_ledger_is_of_this_rank_s_streams_alone(world: int) -> None:
    """Full packs fill each rank's streams wholly; as many ranks as streams is the most."""
    for rank in range(world):
        stream = stream_of([BUDGET // 2] * 60, 3, rank, world)
        mine = len(range(rank, 3, world))
        for step in (1, 2):
            assert len(stream.next_step()) == mine
            ledger = stream.metrics()
            assert ledger["fill"] == 1.0 and ledger["tokens"] == BUDGET * mine
            assert ledger["samples"] == 2 * mine and ledger["samples_seen"] == 2 * mine * step
            assert ledger["samples_pending"] == 0
        stream.close()


def test_draws_of_sets_do_not_depend_on_where_they_begin() -> None:
    """Blocks of 4,096 words: a range that ends at a block, begins at one, or crosses it."""
    whole = set_draws(np.arange(3 * 4096), [1.0, 2.0, 1.0], FINGERPRINT, 0, 1)
    for begin, end in ((0, 4096), (4096, 8192), (4095, 4097), (4096, 4097), (1, 12288), (8191, 8193)):
        part = set_draws(np.arange(begin, end), [1.0, 2.0, 1.0], FINGERPRINT, 0, 1)
        assert part.tolist() == whole[begin:end].tolist()
    shares = np.bincount(whole, minlength=3) / len(whole)
    assert np.abs(shares - [0.25, 0.5, 0.25]).max() < 0.02  # sd 0.0045
