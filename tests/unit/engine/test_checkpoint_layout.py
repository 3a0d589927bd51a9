"""Coordinates of flat shards, and one rank's file: pure functions, no process group."""

import errno
import itertools
import random

import pytest
import safetensors.torch
import torch

from engine import checkpoint_writer, layout
from engine.checkpoint_reader import Saved
from engine.checkpoint_writer import Flat, Job, Staging
from engine.layout import Segment


def random_sizes(draws):
    return [(f"layer.{index}", draws.randint(1, 40)) for index in range(draws.randint(1, 9))]


def zero_2(sizes, world):
    """DeepSpeed's rule: padded to a multiple of 2 x ranks, equal shares."""
    share = -(-sum(numel for _, numel in sizes) // (2 * world)) * 2
    return [layout.window(sizes, rank * share, share) for rank in range(world)]


def zero_3(sizes, world):
    return [layout.pieces(sizes, rank, world) for rank in range(world)]


@pytest.mark.parametrize("rule", [zero_2, zero_3])
def test_every_value_lies_in_one_shard_and_none_twice(rule):
    draws = random.Random(0)
    for _ in range(200):
        sizes, world = random_sizes(draws), draws.randint(1, 7)
        shards = rule(sizes, world)
        for name, numel in sizes:
            places = sorted((s.start, s.length) for shard in shards for s in shard if s.parameter == name)
            position = 0
            for start, length in places:
                assert start == position and length > 0
                position += length
            assert position == numel
        for shard in shards:
            ends = sorted((s.offset, s.offset + s.length) for s in shard)
            assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))


@pytest.mark.parametrize(("before", "after"), [(zero_2, zero_3), (zero_3, zero_2)])
def test_shards_are_cut_anew_for_other_ranks_and_stages_with_the_same_bits(before, after, tmp_path):
    draws = random.Random(1)
    for number in range(20):
        sizes = random_sizes(draws)
        whole = {name: torch.randn(numel) for name, numel in sizes}
        folder = tmp_path / str(number)
        folder.mkdir()
        names = []
        for rank, segments in enumerate(before(sizes, draws.randint(1, 5))):
            flat = torch.full((sum(numel for _, numel in sizes) + 8,), float("nan"))
            for s in segments:
                flat[s.offset : s.offset + s.length] = whole[s.parameter][s.start : s.start + s.length]
            names.append(f"{rank}.safetensors")
            checkpoint_writer.write(folder / names[-1], [Flat("main/master", flat, segments)])
        with Saved(folder, names, own=draws.randrange(len(names))) as saved:
            for segments in after(sizes, draws.randint(1, 5)):
                flat = torch.zeros(sum(numel for _, numel in sizes) + 8)
                saved.fill("main/master", segments, flat)
                for s in segments:
                    expected = whole[s.parameter][s.start : s.start + s.length]
                    assert torch.equal(flat[s.offset : s.offset + s.length], expected)


def mixed_flats():
    return [
        Flat(
            "main/master", torch.arange(5.0), [Segment("a.b", 3, 2, 0), Segment("c", 0, 2, 2)]
        ),  # 1 of padding
        Flat("main/momentum_buffer", torch.arange(3).bfloat16(), [Segment("c", 0, 3, 0)]),
        Flat("main/buffer", torch.tensor([7]), [Segment("seen", 0, 1, 0)]),
        Flat("main/buffer", torch.tensor([True, False, True]), [Segment("mask", 0, 3, 0)]),
    ]


def test_a_file_is_safetensors_that_the_library_reads(tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    total = checkpoint_writer.write(path, mixed_flats())
    assert total.num_bytes == path.stat().st_size and not checkpoint_writer.checked(path, total)
    stored = safetensors.torch.load_file(path)
    assert {name: value.tolist() for name, value in stored.items()} == {
        "main/master/a.b:3": [0.0, 1.0],
        "main/master/c:0": [2.0, 3.0],
        "main/momentum_buffer/c:0": [0.0, 1.0, 2.0],
        "main/buffer/seen:0": [7],
        "main/buffer/mask:0": [True, False, True],
    }
    assert stored["main/momentum_buffer/c:0"].dtype == torch.bfloat16


def test_any_flipped_bit_and_any_missing_byte_is_found(tmp_path):
    path = tmp_path / "rank_00000.safetensors"
    total = checkpoint_writer.write(path, mixed_flats())
    content = path.read_bytes()
    for position in range(len(content)):
        path.write_bytes(content[:position] + bytes([content[position] ^ 4]) + content[position + 1 :])
        assert "wrong checksum" in checkpoint_writer.checked(path, total)
    path.write_bytes(content[:-1])
    assert "bytes instead of" in checkpoint_writer.checked(path, total)
    path.unlink()
    assert "cannot be read" in checkpoint_writer.checked(path, total)


def test_a_full_disk_in_the_thread_is_raised_where_the_result_is_asked_for(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_writer.os, "fsync", full)
    job = Job(tmp_path / "rank_00000.safetensors", mixed_flats())
    with pytest.raises(OSError, match="No space left"):
        job.result()


def test_staged_values_stay_while_the_training_goes_on():
    staging, values = Staging(), torch.arange(4.0)
    (copy,) = staging.copy([Flat("main/master", values, [Segment("a", 0, 4, 0)])])
    values.add_(1)
    assert copy.tensor.tolist() == [0, 1, 2, 3]
    (again,) = staging.copy([Flat("main/master", values, [Segment("a", 0, 4, 0)])])
    assert again.tensor.data_ptr() == copy.tensor.data_ptr(), "the memory is taken once"
    assert again.tensor.tolist() == [1, 2, 3, 4]
