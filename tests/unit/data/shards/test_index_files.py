"""Records of many shards by number: files and memory, across blocks and shards, more than what is kept."""

from pathlib import Path

import numpy as np
import pytest

from data.shards import index_files
from data.shards.index import RECORD
from data.shards.index_files import BLOCK_RECORDS, IndexFiles


def test_records_are_those_of_the_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_files, "MAX_BLOCKS", 3)
    monkeypatch.setattr(index_files, "MAX_OPEN_INDICES", 1)
    rng = np.random.default_rng(0)
    counts = [1, 3 * BLOCK_RECORDS, 2 * BLOCK_RECORDS + 7, BLOCK_RECORDS - 1]
    arrays = [np.frombuffer(rng.bytes(count * RECORD.itemsize), RECORD) for count in counts]
    for number, array in enumerate(arrays):
        np.save(tmp_path / f"{number}.npy", array)
    paths = [tmp_path / f"{number}.npy" for number in range(len(counts))]
    everything, first = np.concatenate(arrays), np.cumsum([0, *counts])
    for indices in (
        IndexFiles(paths, counts),
        IndexFiles(arrays, counts),
        IndexFiles([paths[0], *arrays[1:]], counts),
    ):
        assert np.array_equal(np.concatenate(list(indices)), everything)
        for size in (1, 40, len(everything)):
            ordered = np.sort(rng.permutation(len(everything))[:size])
            shards = np.searchsorted(first, ordered, side="right") - 1
            assert np.array_equal(indices.take(shards, ordered - first[shards]), everything[ordered])
