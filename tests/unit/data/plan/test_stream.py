"""The stream (docs/architecture.md, 2): the same packs on any ranks and after any resume; nothing lost or repeated."""

from __future__ import annotations

import copy
import json
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from base.config import ConfigError, UserError
from data.config import DataConfig, SetConfig
from data.plan.mixture import Mixture
from data.plan.plan import epoch_order
from data.plan.stream import PackStream
from data.shards import Sample, ShardDataset, ShardWriter

NUM_SAMPLES = 700
NUM_STREAMS = 8
WORLDS = (1, 2, 3, 5, 8)
BUDGET = 100
NUM_STEPS = 20  # about two epochs: a pack holds about 10 samples of 4 to 16 tokens, eight packs a step


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
        self.budget_key = "the budget"

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
    return [
        PackStream(Mixture.of(dataset), Recorder(), rank=rank, **{**settings, **change})
        for rank in range(world)
    ]


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


@pytest.mark.parametrize("world", WORLDS)
def test_packs_do_not_depend_on_the_number_of_ranks(
    dataset: ShardDataset, uninterrupted: list[list[Pack]], world: int
) -> None:
    ranks = open_ranks(dataset, world)
    assert run(ranks, NUM_STEPS) == uninterrupted
    close(ranks)


@pytest.mark.parametrize("trial", range(10))
def test_resume_on_other_ranks_continues_the_same_packs(
    dataset: ShardDataset, uninterrupted: list[list[Pack]], trial: int
) -> None:
    rng = np.random.Generator(np.random.Philox(key=trial))
    stops = sorted(rng.choice(NUM_STEPS, 3, replace=False).tolist())
    steps: list[list[Pack]] = []
    state = None
    for stop in [*stops, NUM_STEPS]:
        ranks = open_ranks(dataset, int(rng.choice(WORLDS)), prefetch_steps=int(rng.integers(1, 5)))
        for rank in ranks:
            if state is not None:
                rank.load_state_dict(state)
        steps += run(ranks, stop - len(steps))
        state = merged_state(ranks)
        close(ranks)
    assert steps == uninterrupted


def test_each_epoch_is_an_exact_permutation(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 1)
    steps = run(ranks, 40)
    close(ranks)
    cursors = merged_state(ranks)["streams"].values()
    num_complete = min([c["places"][0][0] for c in cursors] + [e for c in cursors for e, _ in c["pending"]])
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
    assert len(cursor["pending"]) < 128
    assert cursor["num_samples"] == num_packed
    assert cursor["num_draws"] == num_packed + len(cursor["pending"])
    ((epoch, position),) = cursor["places"]
    assert cursor["num_draws"] == epoch * NUM_SAMPLES + position


def test_packs_follow_the_rule_word_by_word(dataset: ShardDataset) -> None:
    """The rule as a sentence: in order while they fit; then, among the next 128, the longest that still fits."""
    plan = [
        (epoch, int(index))
        for epoch in range(4)
        for index in epoch_order(NUM_SAMPLES, dataset.fingerprint, 5, epoch, NUM_STREAMS, 2)
    ]
    lengths = dataset.num_image_tokens.tolist()
    stream = open_ranks(dataset, 1)[0]
    cursor = stream._cursor(2)
    for _ in range(25):
        pack, free = [], BUDGET
        while plan and lengths[plan[0][1]] <= free:
            pack.append(plan.pop(0))
            free -= lengths[pack[-1][1]]
        while fitting := [item for item in plan[:128] if lengths[item[1]] <= free]:
            pack.append(max(fitting, key=lambda item: lengths[item[1]]))  # the first of the longest
            plan.remove(pack[-1])
            free -= lengths[pack[-1][1]]
        epochs, addresses = cursor.next_pack()
        assert list(zip(epochs.tolist(), addresses.tolist(), strict=True)) == pack


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
    message = "9 ranks but num_streams = 8: num_streams must be at least as many as the most ranks the run"
    with pytest.raises(UserError, match=message):
        open_ranks(dataset, 9)


def test_sample_over_the_budget_is_named(tmp_path: Path) -> None:
    long = write(tmp_path, [10, 10, 101, 10])
    with pytest.raises(
        UserError, match=r"shard-000000.tar: sample 's0002': length 101 is over .* 100 \(1 such"
    ):
        open_ranks(long, 1)


def test_fewer_samples_than_streams_is_refused(tmp_path: Path) -> None:
    tiny = write(tmp_path, [10, 10])
    with pytest.raises(UserError, match="2 samples cannot feed num_streams = 8"):
        open_ranks(tiny, 1)


@pytest.mark.parametrize("change", [{"seed": 6}, {"num_streams": 9}])
def test_resume_with_another_plan_is_refused(dataset: ShardDataset, change: dict[str, int]) -> None:
    state = merged_state(open_ranks(dataset, 1))
    with pytest.raises(UserError, match=f"resume: data.{next(iter(change))} was"):
        open_ranks(dataset, 1, **change)[0].load_state_dict(state)


def test_resume_with_another_budget_is_refused(dataset: ShardDataset) -> None:
    """max_epochs counts the packs of the whole run: they must all have one size."""
    state = merged_state(open_ranks(dataset, 1))
    other = PackStream(
        Mixture.of(dataset), Recorder(50), num_streams=NUM_STREAMS, seed=5, rank=0, world=1, prefetch_steps=1
    )
    with pytest.raises(UserError, match="resume: the budget was 100, is 50"):
        other.load_state_dict(state)


def test_resume_on_another_data_set_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    state = merged_state(open_ranks(dataset, 1))
    with pytest.raises(
        UserError, match=r"resume: what data.shards, data.mixture or data.quarantine name was"
    ):
        open_ranks(write(tmp_path, [10] * 10), 1)[0].load_state_dict(state)


def test_resume_whose_pending_samples_have_other_keys_is_refused(dataset: ShardDataset) -> None:
    ranks = open_ranks(dataset, 1)
    run(ranks, 2)
    state = merged_state(ranks)
    close(ranks)
    changed = copy.deepcopy(state)
    stream = next(name for name, cursor in changed["streams"].items() if cursor["pending"])
    changed["streams"][stream]["pending"][0][1] += 1
    with pytest.raises(UserError, match=f"data stream {stream} would continue with other samples"):
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


@pytest.mark.parametrize("sets", [{}, {"shards": "a", "mixture": {"b": SetConfig("b")}}])
def test_config_asks_for_shards_or_a_mixture(sets: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="either shards or mixture"):
        DataConfig(**sets)


# Epochs, mixtures, quarantine ---------------------------------------------------------------------


@pytest.mark.parametrize("max_epochs", [1, 2])
def test_max_epochs_ends_before_a_sample_comes_once_more(dataset: ShardDataset, max_epochs: int) -> None:
    (rank,) = ranks = open_ranks(dataset, 1)
    num_steps = rank.num_steps(max_epochs)
    steps = run(ranks, num_steps + 1)
    close(ranks)
    assert {epoch for packs in steps[:-1] for pack in packs for epoch in pack.epochs} == set(
        range(max_epochs)
    )
    assert any(epoch == max_epochs for pack in steps[-1] for epoch in pack.epochs)
    assert [rank.num_steps(max_epochs) for rank in open_ranks(dataset, 3)] == [num_steps] * 3


def test_too_small_for_one_pack_within_the_epochs_is_refused(tmp_path: Path) -> None:
    tiny = write(tmp_path, [10] * NUM_STREAMS)
    with pytest.raises(UserError, match="too small for one pack of 100 in each of 8 streams within 1 epochs"):
        open_ranks(tiny, 1)[0].num_steps(1)


@pytest.fixture(scope="module")
def mixture(dataset: ShardDataset, tmp_path_factory: pytest.TempPathFactory) -> Mixture:
    """700 samples three times as often as 200 others."""
    other = write(tmp_path_factory.mktemp("other"), [8] * 200, name="o")
    return Mixture.open({"s": SetConfig(str(dataset.directory), 3.0), "o": SetConfig(str(other.directory))})


def open_mixture(mixture: Mixture, world: int) -> list[PackStream]:
    return [
        PackStream(
            mixture, Recorder(), num_streams=NUM_STREAMS, seed=5, rank=rank, world=world, prefetch_steps=2
        )
        for rank in range(world)
    ]


def test_a_mixture_draws_by_weight_and_each_set_keeps_its_own_exact_epochs(mixture: Mixture) -> None:
    (rank,) = ranks = open_mixture(mixture, 1)
    steps = run(ranks, 60)
    metrics = rank.metrics()
    close(ranks)
    drawn = [
        (key, epoch)
        for packs in steps
        for p in packs
        for key, epoch in zip(p.sample_ids, p.epochs, strict=True)
    ]
    share = sum(key.startswith("s") for key, _ in drawn) / len(drawn)
    assert abs(share - 0.75) < 0.03  # 4,800 draws: sd 0.006
    cursors = merged_state(ranks)["streams"].values()
    for number, (letter, size) in enumerate((("s", NUM_SAMPLES), ("o", 200))):
        first = mixture.first[number]
        pending = [e for c in cursors for e, a in c["pending"] if first <= a < first + size]
        num_complete = min([c["places"][number][0] for c in cursors] + pending)
        assert num_complete >= 3
        for epoch in range(num_complete):
            seen = [key for key, e in drawn if e == epoch and key.startswith(letter)]
            assert len(seen) == len(set(seen)) == size
    assert metrics["samples/s"] + metrics["samples/o"] == metrics["samples"]
    assert metrics["epoch/o"] >= 4


@pytest.mark.parametrize("trial", range(5))
def test_a_mixture_resumes_exactly_on_other_ranks(mixture: Mixture, trial: int) -> None:
    whole = open_mixture(mixture, 1)
    uninterrupted = run(whole, 12)
    close(whole)
    rng = np.random.Generator(np.random.Philox(key=trial))
    first, second = (open_mixture(mixture, int(world)) for world in rng.choice(WORLDS, 2))
    stop = int(rng.integers(1, 12))
    steps = run(first, stop)
    for rank in second:
        rank.load_state_dict(merged_state(first))
    steps += run(second, 12 - stop)
    close([*first, *second])
    assert steps == uninterrupted


def test_a_mixture_of_other_weights_is_another_plan(mixture: Mixture) -> None:
    heavier = Mixture([mixture.members[0], replace(mixture.members[1], weight=2.0)])
    assert heavier.fingerprint != mixture.fingerprint


def test_quarantined_samples_are_left_out_and_change_the_plan(dataset: ShardDataset, tmp_path: Path) -> None:
    bad = ["s0007", "s0444"]
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.write_text("".join(json.dumps({"key": key, "reason": "damaged"}) + "\n" for key in bad))
    config = SetConfig(str(dataset.directory), quarantine=str(quarantine))
    clean = Mixture.open({"": config})
    assert len(clean) == NUM_SAMPLES - 2
    assert clean.fingerprint != dataset.fingerprint
    ranks = open_mixture(clean, 2)
    seen = {key for packs in run(ranks, 20) for pack in packs for key in pack.sample_ids}
    close(ranks)
    assert seen == {f"s{number:04d}" for number in range(NUM_SAMPLES)} - set(bad)


def test_a_lost_shard_can_be_quarantined(tmp_path: Path) -> None:
    directory = tmp_path / "set"
    write(directory, [10] * 600)
    (directory / "shard-000001.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000001\.tar"):
        Mixture.open({"": SetConfig(str(directory))})
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.write_text(json.dumps({"shard": "shard-000001.tar", "reason": "lost"}) + "\n")
    rest = Mixture.open({"": SetConfig(str(directory), quarantine=str(quarantine))})
    keys = {sample.key for sample in rest.read(np.arange(len(rest)))}
    assert keys == {f"s{number:04d}" for number in [*range(256), *range(512, 600)]}


def test_quarantine_of_another_data_set_is_refused(dataset: ShardDataset, tmp_path: Path) -> None:
    quarantine = tmp_path / "quarantine.jsonl"
    quarantine.write_text(json.dumps({"key": "elsewhere", "reason": "damaged"}) + "\n")
    with pytest.raises(UserError, match=r"1 samples are not in .*, the first is 'elsewhere'"):
        Mixture.open({"": SetConfig(str(dataset.directory), quarantine=str(quarantine))})


# The thread ---------------------------------------------------------------------------------------


class Failing(Recorder):
    def collate(
        self, samples: Sequence[Sample], *, step: int, stream: int, epochs: Sequence[int], seed: int
    ) -> Pack:
        if step == 3:
            raise UserError("sample 'x' is bad")
        return super().collate(samples, step=step, stream=stream, epochs=epochs, seed=seed)


def test_error_of_the_thread_comes_out_of_next_step_at_its_step(dataset: ShardDataset) -> None:
    stream = PackStream(
        Mixture.of(dataset), Failing(), num_streams=1, seed=0, rank=0, world=1, prefetch_steps=2
    )
    for _ in range(3):
        stream.next_step()
    for _ in range(2):
        with pytest.raises(UserError, match="sample 'x' is bad"):
            stream.next_step()
    assert stream.state_dict()["streams"]["0"]["num_packs"] == 3
    stream.close()


def test_a_shard_that_is_lost_in_a_run_is_named_and_once_it_is_back_the_same_packs_come(tmp_path) -> None:
    lengths = [10] * 1280
    (whole,) = open_ranks(write(tmp_path, lengths), 1, num_streams=2)
    expected = run([whole], 60)
    (stream,) = open_ranks(ShardDataset.open(tmp_path), 1, num_streams=2)
    found = run([stream], 5)
    contents = {shard: shard.read_bytes() for shard in tmp_path.glob("*.tar")}
    for shard in contents:
        os.truncate(shard, 0)  # a file that is removed can still be read where it is open
    with pytest.raises(UserError, match=r"shard-\d+\.tar") as raised:
        for _ in range(55):
            found += run([stream], 1)
    assert "\n" not in str(raised.value) and len(found) < 60
    state = merged_state([stream])
    close([stream, whole])
    for shard, content in contents.items():
        shard.write_bytes(content)
    (again,) = open_ranks(ShardDataset.open(tmp_path), 1, num_streams=2)
    again.load_state_dict(state)
    assert found + run([again], 60 - len(found)) == expected
    close([again])


def test_close_ends_the_thread(dataset: ShardDataset) -> None:
    before = threading.active_count()
    for prefetch_steps in (1, 3):
        (rank,) = open_ranks(dataset, 1, prefetch_steps=prefetch_steps)
        rank.next_step()
        assert threading.active_count() == before + 1
        rank.close()
        rank.close()
        assert threading.active_count() == before


def test_packs_are_pinned_by_the_thread_that_reads_ahead(dataset: ShardDataset, monkeypatch) -> None:
    """One block a pack, made where no step waits for it."""
    pinned_in: list[str] = []

    def pin(pack: Pack) -> Pack:
        pinned_in.append(threading.current_thread().name)
        return replace(pack, epochs=())

    monkeypatch.setattr("data.plan.stream.pinned", pin)
    (stream,) = open_ranks(dataset, 1)
    packs = stream.next_step()
    stream.close()
    assert all(pack.epochs == () for pack in packs)
    assert len(pinned_in) >= len(packs) and set(pinned_in) == {"prefetch"}
