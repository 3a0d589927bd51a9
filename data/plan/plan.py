"""Pure functions for the order of samples and every seed of the data layer (docs/architecture.md, section 2).

They use raw Philox words and a stable sort, which numpy keeps stable between versions; it may change
`Generator.permutation`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from base.config import UserError

BLOCK_SAMPLES = 64
WINDOW_BLOCKS = 32
DRAW_BLOCK = 4096  # words that `set_draws` draws with one Philox key


def epoch_order(
    num_samples: int, fingerprint: str, seed: int, epoch: int, num_streams: int, stream: int
) -> npt.NDArray[np.int64]:
    """Sample indices of one stream in one epoch, int64 [n]; the streams together hold every sample once.

    Blocks of 64 neighbours (smaller blocks if the data set is too small to give every stream one) are permuted and
    dealt to the streams in turn. Each stream then shuffles its samples inside windows of 32 blocks. So reads are nearly
    sequential and the order is nearly uniform. Raises UserError: fewer samples than streams.
    """
    assert 0 <= stream < num_streams
    block_samples = _block_samples(num_samples, num_streams)
    blocks = _block_order(-(-num_samples // block_samples), fingerprint, seed, epoch)[stream::num_streams]
    window = WINDOW_BLOCKS * block_samples
    indices = np.full(-(-len(blocks) // WINDOW_BLOCKS) * window, num_samples)  # num_samples: no such sample
    indices[: len(blocks) * block_samples] = (
        blocks[:, None] * block_samples + np.arange(block_samples)
    ).reshape(-1)
    exists = indices < num_samples
    words = np.full(len(indices), 2**64 - 1, np.uint64)
    words[exists] = _words(int(exists.sum()), "samples", fingerprint, seed, epoch, stream)
    order = np.argsort(words.reshape(-1, window), axis=1, kind="stable")
    shuffled = np.take_along_axis(indices.reshape(-1, window), order, axis=1).reshape(-1)
    return shuffled[shuffled < num_samples].astype(np.int64, copy=False)


@functools.lru_cache(maxsize=2)  # all streams need one order
def _block_order(num_blocks: int, fingerprint: str, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.argsort(_words(num_blocks, "blocks", fingerprint, seed, epoch), kind="stable")


def window_samples(num_samples: int, num_streams: int) -> int:
    """Number of samples in one full shuffle window of `epoch_order`. Raises UserError: as `epoch_order`."""
    return WINDOW_BLOCKS * _block_samples(num_samples, num_streams)


def set_draws(
    draws: npt.NDArray[np.int64], weights: Sequence[float], fingerprint: str, seed: int, stream: int
) -> npt.NDArray[np.int64]:
    """Number of the set that each draw of a stream takes, in proportion to `weights`; int64 [len(draws)]."""
    blocks = [
        _words(DRAW_BLOCK, "sets", fingerprint, seed, stream, block)
        for block in range(int(draws[0]) // DRAW_BLOCK, int(draws[-1]) // DRAW_BLOCK + 1)
    ]
    words = np.concatenate(blocks)[draws - draws[0] // DRAW_BLOCK * DRAW_BLOCK]
    shares = np.cumsum(weights) / np.sum(weights)
    return np.asarray(np.searchsorted(shares[:-1], words / 2**64, side="right"), np.int64)


def pack_seed(seed: int, step: int, stream: int) -> int:
    """Seed of noise and timesteps of the pack that `stream` yields at global step `step`; 63 bits."""
    return int(_digest_words("pack", seed, step, stream)[0]) & (2**63 - 1)


def sample_uniforms(seed: int, epoch: int, key: str) -> tuple[float, float, float, float]:
    """Four uniform numbers in [0, 1) for the choices about one sample in one epoch: caption, dropouts, crop."""
    # A float64 holds 53 bits; 64 bits would sometimes round up to 1.
    a, b, c, d = ((int(word) >> 11) / 2**53 for word in _digest_words("sample", seed, epoch, key))
    return a, b, c, d


def _block_samples(num_samples: int, num_streams: int) -> int:
    if num_samples < num_streams:
        raise UserError(
            f"{num_samples} samples cannot feed num_streams = {num_streams}; lower data.num_streams"
        )
    return min(BLOCK_SAMPLES, num_samples // num_streams)


def _words(count: int, *names: object) -> npt.NDArray[np.uint64]:
    """`count` random 64-bit words, determined by `names`."""
    low, high = _digest_words(*names)[:2].tolist()
    words: npt.NDArray[np.uint64] = np.random.Philox(key=low + (high << 64)).random_raw(count)
    return words


def _digest_words(*names: object) -> npt.NDArray[np.uint64]:
    """SHA-256 of the names as four 64-bit words. Python's own hash() differs between processes."""
    return np.frombuffer(hashlib.sha256("/".join(map(str, names)).encode()).digest(), "<u8")
