"""Contract 2: the same packs on any number of ranks and after any resume; nothing lost, nothing repeated."""

from __future__ import annotations

import copy
import json
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data.plan import epoch_order
from data.shards import Sample, ShardDataset, ShardWriter
from data.stream import DataConfig, PackStream
from engine.config import ConfigError, UserError

NUM_SAMPLES = 700
NUM_STREAMS = 3
BUDGET = 100
NUM_STEPS = 40  # about two epochs: a pack holds about 10 samples of 4 to 16 tokens, three packs a step


@dataclass(frozen=True)
class Pack:
    sample_ids: tuple[str, ...]
    epochs: tuple[int, ...]
    step: int
    stream: int

    def to(self, device: torch.device) -> Pack:
        return self


class Recorder:
    """A packer whose packs are what it was asked for."""

    def __init__(self, budget: int = BUDGET) -> None:
        self.budget = budget

    def lengths(self, dataset: ShardDataset) -> npt.NDArray[np.int64]:
        return dataset.num_image_tokens

    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> Pack:
        return Pack(tuple(sample.key for sample in samples), tuple(epochs), step, stream)


def write(directory: Path, lengths: Sequence[int], name: str = "s") -> ShardDataset:
    with ShardWriter(directory, max_samples_per_shard=256, source="test") as writer:
        for number, length in enumerate(lengths):
            writer.write(Sample(f"{name}{number:04d}", {"json": b"{}"}), num_image_tokens=int(length))
    return ShardDataset.open(directory)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    lengths = np.random.Generator(np.random.Philox(key=1)).integers(4, 17, NUM_SAMPLES)
    return write(tmp_path_factory.mktemp("stream"), lengths.tolist())


def open_ranks(dataset: ShardDataset, world: int, **change: Any) -> list[PackStream]:
    settings: dict[str, Any] = {"num_streams": NUM_STREAMS, "seed": 5, "world": world, "prefetch_steps": 2}
    return [PackStream(dataset, Recorder(), rank=rank, **{**settings, **change}) for rank in range(world)]


def run(ranks: list[PackStream], num_steps: int) -> list[list[Any]]:
    """Global steps: the packs of all ranks, ordered by stream."""
    steps = []
    for _ in range(num_steps):
        packs = [pack for rank in ranks for pack in rank.next_step()]
        steps.append(sorted(packs, key=lambda pack: pack.stream))
    return steps


def merged_state(ranks: list[PackStream]) -> dict[str, Any]:
    """What the checkpoint does: the cursors of all ranks together, through JSON."""
    states = [rank.state_dict() for rank in ranks]
    streams = {stream: cursor for state in states for stream, cursor in state["streams"].items()}
    merged: dict[str, Any] = json.loads(json.dumps({**states[0], "streams": streams}))
    return merged


def close(ranks: list[PackStream]) -> None:
    for rank in ranks:
        rank.close()


@pytest.fixture(scope="module")
def uninterrupted(dataset: ShardDataset) -> list[list[Pack]]:
    ranks = open_ranks(dataset, 1)
    steps = run(ranks, NUM_STEPS)
    close(ranks)
    return steps


def test_each_step_takes_one_pack_of_each_stream(uninterrupted: list[list[Pack]]) -> None:
    for number, packs in enumerate(uninterrupted):
        assert [pack.stream for pack in packs] == list(range(NUM_STREAMS))
        assert {pack.step for pack in packs} == {number}
        assert all(pack.sample_ids for pack in packs)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_packs_do_not_depend_on_the_number_of_ranks(
    dataset: ShardDataset, uninterrupted: list[list[Pack]], world: int
) -> None:
    ranks = open_ranks(dataset, world)
    assert run(ranks, NUM_STEPS) == uninterrupted
    close(ranks)


@pytest.mark.parametrize("trial", range(6))
def test_resume_on_other_ranks_continues_the_same_packs(
    dataset: ShardDataset, uninterrupted: list[list[Pack]], trial: int
) -> None:
    rng = np.random.Generator(np.random.Philox(key=trial))
    stops = sorted(rng.choice(NUM_STEPS, 3, replace=False).tolist())
    steps: list[list[Pack]] = []
    state = None
    for stop in [*stops, NUM_STEPS]:
        ranks = open_ranks(
            dataset, int(rng.integers(1, NUM_STREAMS + 1)), prefetch_steps=int(rng.integers(1, 5))
        )
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        steps += run(ranks, stop - len(steps))
        state = merged_state(ranks)
        close(ranks)
    assert steps == uninterrupted


def test_each_epoch_is_an_exact_permutation(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 1)
    steps = run(ranks, 100)
    close(ranks)
    cursors = merged_state(ranks)["streams"].values()
    num_complete = min(epoch for cursor in cursors for epoch, _ in cursor["pending"])
    assert num_complete >= 3
    seen: dict[int, Counter[str]] = {}
    for packs in steps:
        for pack in packs:
            for key, epoch in zip(pack.sample_ids, pack.epochs, strict=True):
                seen.setdefault(epoch, Counter())[key] += 1
    for epoch in range(num_complete):  # streams roll over on their own: later epochs are still under way
        assert len(seen[epoch]) == NUM_SAMPLES
        assert set(seen[epoch].values()) == {1}


def test_packs_are_full_and_never_over_the_budget(
    dataset: ShardDataset, uninterrupted: list[list[Pack]]
) -> None:
    length = {
        sample.key: int(n)
        for sample, n in zip(dataset.read(range(700)), dataset.num_image_tokens, strict=True)
    }
    totals = [sum(length[key] for key in pack.sample_ids) for packs in uninterrupted for pack in packs]
    assert max(totals) <= BUDGET
    assert np.mean(totals) / BUDGET > 0.99  # best fit among 128; taking strictly in order gives about 0.95


def test_every_sample_taken_from_the_plan_is_packed_or_pending(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 1, num_streams=1)
    num_packed = sum(len(packs[0].sample_ids) for packs in run(ranks, 60))
    close(ranks)
    cursor = merged_state(ranks)["streams"]["0"]
    assert len(cursor["pending"]) <= 128
    assert cursor["position"] + cursor["epoch"] * NUM_SAMPLES == num_packed + len(cursor["pending"])


def test_sample_that_was_passed_over_opens_the_next_pack(tmp_path: Path) -> None:
    """Lengths 60 and 30: 60 + 30 leaves 10, so a second 60 is passed over; it must not wait long."""
    mixed = write(tmp_path, [60, 30] * 100)
    ranks = open_ranks(mixed, 1, num_streams=1)
    length = {f"s{number:04d}": 60 if number % 2 == 0 else 30 for number in range(200)}
    plan = [f"s{index:04d}" for index in epoch_order(200, mixed.fingerprint, 5, 0, 1, 0)]
    for packs in run(ranks, 50):
        keys = packs[0].sample_ids
        assert keys[0] == plan[0]  # the oldest sample, whatever its length
        for key in keys:
            plan.remove(key)
        assert sum(length[key] for key in keys) == 90
    close(ranks)


def test_state_is_of_the_returned_step_not_of_the_prefetched(dataset: ShardDataset) -> None:
    for prefetch_steps in (1, 4):
        (rank,) = ranks = open_ranks(dataset, 1, prefetch_steps=prefetch_steps)
        run(ranks, 5)
        assert {cursor["num_packs"] for cursor in rank.state_dict()["streams"].values()} == {5}
        rank.close()


def test_closed_stream_goes_on_after_the_last_returned_step(
    dataset: ShardDataset, uninterrupted: list[list[Pack]]
) -> None:
    (rank,) = ranks = open_ranks(dataset, 1)
    steps = run(ranks, 3)
    rank.close()
    steps += run(ranks, 3)
    rank.close()
    assert steps == uninterrupted[:6]


def test_same_samples_in_another_order_have_another_hash(dataset: ShardDataset) -> None:
    hashes = []
    for seed in (5, 5, 6):
        ranks = open_ranks(dataset, 1, seed=seed)
        run(ranks, 2)
        hashes.append([cursor["order_hash"] for cursor in merged_state(ranks)["streams"].values()])
        close(ranks)
    assert hashes[0] == hashes[1]
    assert set(hashes[0]).isdisjoint(hashes[2])


def test_ledger_of_a_step(dataset: ShardDataset) -> None:
    (rank,) = open_ranks(dataset, 1)
    assert rank.metrics() == {}
    packs = rank.next_step()
    metrics = rank.metrics()
    rank.close()
    assert metrics["samples"] == sum(len(pack.sample_ids) for pack in packs)
    assert 0.9 < metrics["fill"] == metrics["tokens"] / (NUM_STREAMS * BUDGET) <= 1
    assert metrics["epoch"] == 0
    assert metrics["data_wait_s"] >= 0


def test_tiny_data_set_feeds_every_stream(tmp_path: Path) -> None:
    tiny = write(tmp_path, [40] * NUM_STREAMS)
    ranks = open_ranks(tiny, 1)
    for packs in run(ranks, 10):
        assert [len(pack.sample_ids) for pack in packs] == [2] * NUM_STREAMS
    close(ranks)


# Refusals -----------------------------------------------------------------------------------------


def test_more_ranks_than_streams_is_refused(dataset: ShardDataset) -> None:
    message = "4 ranks but num_streams = 3: num_streams must be at least as many as the most ranks the run"
    with pytest.raises(UserError, match=message):
        open_ranks(dataset, 4)


def test_sample_over_the_budget_is_named(tmp_path: Path) -> None:
    long = write(tmp_path, [10, 10, 101, 10])
    with pytest.raises(
        UserError, match=r"shard-000000.tar: sample 's0002': length 101 is over .* 100 \(1 such"
    ):
        open_ranks(long, 1)


def test_fewer_samples_than_streams_is_refused(tmp_path: Path) -> None:
    tiny = write(tmp_path, [10, 10])
    with pytest.raises(UserError, match="2 samples cannot feed num_streams = 3"):
        open_ranks(tiny, 1)


@pytest.mark.parametrize("change", [{"seed": 6}, {"num_streams": 4}])
def test_resume_with_another_plan_is_refused(dataset: ShardDataset, change: dict[str, int]) -> None:
    state = merged_state(open_ranks(dataset, 1))
    with pytest.raises(UserError, match=f"resume: the data's {next(iter(change))} was"):
        open_ranks(dataset, 1, **change)[0].load_state_dict(state)


def test_resume_on_another_data_set_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    state = merged_state(open_ranks(dataset, 1))
    with pytest.raises(UserError, match="resume: the data's fingerprint was"):
        open_ranks(write(tmp_path, [10] * 10), 1)[0].load_state_dict(state)


def test_resume_whose_pending_samples_have_other_keys_is_refused(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 1)
    run(ranks, 2)
    state = merged_state(ranks)
    close(ranks)
    changed = copy.deepcopy(state)
    changed["streams"]["1"]["pending"][0][1] += 1
    with pytest.raises(UserError, match="data stream 1 would continue with other samples"):
        open_ranks(dataset, 1)[0].load_state_dict(changed)


def test_resume_with_a_stream_missing_or_behind_is_refused(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 3)
    run(ranks, 2)
    state = merged_state(ranks)
    with pytest.raises(UserError, match="lacks data stream 0"):
        ranks[0].load_state_dict({**state, "streams": {"1": state["streams"]["1"]}})
    state["streams"]["1"]["num_packs"] = 1
    with pytest.raises(UserError, match="stand at different steps"):
        ranks[0].load_state_dict(state)
    close(ranks)


def test_config_refuses_zero_streams() -> None:
    with pytest.raises(ConfigError, match="num_streams must be at least 1"):
        DataConfig("shards", num_streams=0)


# The thread ---------------------------------------------------------------------------------------


class Failing(Recorder):
    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> Pack:
        if step == 3:
            raise UserError("sample 'x' is bad")
        return super().collate(samples, step=step, stream=stream, epochs=epochs, seed=seed)


def test_error_of_the_thread_comes_out_of_next_step_at_its_step(dataset: ShardDataset) -> None:
    stream = PackStream(dataset, Failing(), num_streams=1, seed=0, rank=0, world=1, prefetch_steps=2)
    for _ in range(3):
        stream.next_step()
    for _ in range(2):
        with pytest.raises(UserError, match="sample 'x' is bad"):
            stream.next_step()
    assert stream.state_dict()["streams"]["0"]["num_packs"] == 3
    stream.close()


def test_close_ends_the_thread(dataset: ShardDataset) -> None:
    before = threading.active_count()
    for prefetch_steps in (1, 3):
        (rank,) = open_ranks(dataset, 1, prefetch_steps=prefetch_steps)
        rank.next_step()
        assert threading.active_count() == before + 1
        rank.close()
        rank.close()
        assert threading.active_count() == before
