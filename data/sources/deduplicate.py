"""Removes near copies of images from finished shards, by perceptual hashes.

shard-000012.phash.npy   one HASHED for each sample that the shard had before the removal
"""

from __future__ import annotations

import collections
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import imagehash
import numpy as np
import numpy.typing as npt

from base import files
from base.config import UserError
from data.processes import over_shards
from data.samples.captions import read_meta
from data.samples.images import decode_image, image_parts
from data.shards import OpenShard, Sample, ShardDataset, ShardEntry, ShardProgress, finished_shard
from data.shards.index import FORMAT_VERSION, Manifest, key_hash, progress_name, sample_crc32
from data.shards.reader import open_shard

MAX_BITS = 3  # of 64: hashes this near agree in one of NUM_BANDS bands of BAND_BITS
NUM_BANDS, BAND_BITS = 4, 16
KIND = "duplicate"  # kind of the reason in rejected.jsonl
SAMPLES_AT_ONCE = 32
PAIRS_AT_ONCE = 1 << 22  # pairs compared in one step, 32 MB

HASHED = np.dtype(
    [
        ("key", "S64"),
        ("crc32", "<u4"),  # of the sample, as in the shard's index
        ("image", "<u8"),  # phash of the image, or of an edit's target
        ("source", "<u8"),  # phash of an edit's source, else 0
        ("text", "<u8"),  # digest of an edit's instructions, else 0
    ]
)
Hashed = npt.NDArray[np.void]
Words = npt.NDArray[np.uint64]
Indices = npt.NDArray[np.int64]


def description(max_bits: int) -> str:
    """The removal in words, a part of the shards' identity. Raises UserError: max_bits is not 0 to 3."""
    if not 0 <= max_bits <= MAX_BITS:
        raise UserError(f"duplicates within {max_bits} bits; choose 0 to {MAX_BITS} of 64")
    return f"without duplicates (phash, {max_bits} of 64 bits)"


def remove_duplicates(
    directory: Path, names: Sequence[str], identity: str, max_bits: int, num_processes: int
) -> int:
    """Drops every sample that resembles an earlier one from the finished shards `names`; returns the number dropped.

    Two samples are alike if their perceptual hashes (phash, 64 bits) differ in at most `max_bits`, 0 to 3. For edits,
    the bits of target and source add up and the instructions must be equal, because small edits hardly change a hash.
    The order is that of `names`; the earlier sample may itself be dropped. The result is exact and does not depend on
    the number of processes. Hashes are kept beside the shards. A killed removal can be repeated and gives equal bytes.
    Raises UserError: a shard is missing, truncated or of another identity, or hashes were lost after a removal.
    """
    shards = [(directory / name, _progress(directory / name, identity)) for name in names]
    num_samples = [shard.num_read for _, shard in shards]
    hashed = over_shards(lambda shard: _hashes(*shards[shard]), num_samples, num_processes, "hashes")
    tables = [np.zeros(0, HASHED), *hashed]  # an empty table, as there may be no shards
    image, source, text = (
        np.concatenate([table[name] for table in tables]) for name in ("image", "source", "text")
    )
    originals = find_duplicates(image, source, text, max_bits=max_bits)
    dropped = np.flatnonzero(originals < np.arange(len(originals)))
    ends = np.cumsum([len(table) for table in tables])

    def place(sample: int) -> tuple[int, str]:
        """The sample's table and key."""
        table = int(np.searchsorted(ends, sample, side="right"))
        return table, tables[table]["key"][sample - ends[table]].decode()

    drops: list[dict[str, str]] = [{} for _ in tables]  # key -> key of the original
    for sample, original in zip(dropped.tolist(), originals[dropped].tolist(), strict=True):
        table, key = place(sample)
        drops[table][key] = place(original)[1]
    rewritten = over_shards(
        lambda shard: _rewrite(*shards[shard], drops[shard + 1]), num_samples, num_processes, "duplicates"
    )
    collections.deque(rewritten, maxlen=0)
    return len(dropped)


def find_duplicates(image: Words, source: Words, text: Words, *, max_bits: int) -> Indices:
    """Index of the earliest sample that each sample resembles, or its own index; int64 [N] from three uint64 [N].

    Equal hashes are grouped first. Other hashes within `max_bits` <= 3 agree in one of four 16-bit bands of `image`
    (pigeonhole principle), so only such pairs are compared.
    """
    order = np.lexsort((text, source, image))  # stable: the earliest of equal hashes comes first
    is_new = np.zeros(len(order), bool)
    is_new[:1] = True
    for column in (image, source, text):
        ordered = column[order]
        is_new[1:] |= ordered[1:] != ordered[:-1]
    first = np.sort(order[is_new])  # the earliest sample of each group, which numbers the groups
    group_of = np.empty(len(order), np.int64)
    group_of[order] = np.searchsorted(first, order[is_new])[np.cumsum(is_new) - 1]
    image, source, text = image[first], source[first], text[first]
    earliest = np.arange(len(first))
    for band in range(NUM_BANDS if max_bits else 0):
        values = (image >> np.uint64(band * BAND_BITS)).astype(np.uint16)
        by_value = np.argsort(values, kind="stable")
        bounds = np.searchsorted(values[by_value], np.arange((1 << BAND_BITS) + 1))
        for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            members = by_value[start:end]  # ascending
            step = max(1, PAIRS_AT_ONCE // max(1, len(members)))
            for a in range(0, len(members) if len(members) > 1 else 0, step):
                rows, others = members[a : a + step], members[: a + step]
                near = np.nonzero(_within(image[rows, None] ^ image[None, others], max_bits))
                later, earlier = rows[near[0]], others[near[1]]
                bits = _num_bits(image[later] ^ image[earlier]) + _num_bits(source[later] ^ source[earlier])
                alike = (bits <= max_bits) & (text[later] == text[earlier])
                np.minimum.at(earliest, later[alike], earlier[alike])
    return np.asarray(first[earliest][group_of], np.int64)


def _within(words: Words, max_bits: int) -> npt.NDArray[np.bool_]:
    """Whether each word has at most `max_bits` bits set: clearing the lowest set bit that often leaves 0."""
    for _ in range(max_bits):
        words = words & (words - np.uint64(1))
    return np.asarray(words == 0, bool)


def _num_bits(words: Words) -> npt.NDArray[np.int64]:
    """Number of set bits in each word, int64 [N]."""
    return np.asarray(np.unpackbits(words[:, None].view(np.uint8), axis=1).sum(axis=1), np.int64)


def _progress(path: Path, identity: str) -> ShardProgress:
    progress = finished_shard(path, source=identity)
    if progress is None:
        raise UserError(f"{path}: missing or cut short; run the writer again")
    return progress


def _hashes(path: Path, progress: ShardProgress) -> Hashed:
    """Hashes of all samples that the shard had before a removal, from the file beside it or from its images."""
    cache = path.with_name(f"{path.name.removesuffix('.tar')}.phash.npy")
    there = {}
    if progress.entry is not None:
        records = open_shard(path.parent, progress.entry)
        there = dict(zip(records["key_hash"].tolist(), records["crc32"].tolist(), strict=True))
    dropped = {key_hash(key) for key, reason in progress.rejected if reason.partition(":")[0] == KIND}
    try:
        hashed: Hashed = np.load(cache, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        hashed = np.zeros(0, HASHED)
    if hashed.dtype == HASHED:
        known = {key_hash(key.decode()): crc for key, crc in hashed[["key", "crc32"]].tolist()}
        if known == known | there and known.keys() == there.keys() | dropped:
            return hashed
    if dropped:
        side = path.with_name(progress_name(path.name))
        raise UserError(f"{cache}: is not of this shard; delete {side}, so that the shard is written anew")
    samples = [] if progress.entry is None else _samples(_dataset(path, progress.entry))
    hashed = np.array([_hash_sample(sample) for sample in samples], HASHED)
    buffer = io.BytesIO()
    np.save(buffer, hashed)
    files.write_bytes(cache, buffer.getvalue())
    return hashed


def _hash_sample(sample: Sample) -> tuple[str, int, int, int, int]:
    """One row of HASHED. Raises UserError: no image, an image that cannot be decoded, or bad json of an edit."""
    parts = image_parts(sample.parts)
    if not parts:
        raise UserError(f"{sample.where}: has no image; duplicates are looked for among images only")
    hashes = [imagehash.phash(decode_image(sample, part)).hash for part in parts]
    words = [int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in hashes]
    crc = sample_crc32(sample.key, sample.parts)
    if len(parts) == 1:
        return sample.key, crc, words[0], 0, 0
    tree = read_meta(sample)
    # Further images than these two must be equal, as the texts must.
    rest = [tree.get("instructions"), tree.get("splits"), words[2:]]
    return sample.key, crc, words[1], words[0], key_hash(json.dumps(rest))


def _rewrite(path: Path, progress: ShardProgress, drops: Mapping[str, str]) -> None:
    """Rewrites a shard without the samples in `drops`, which become rejected; does nothing if they are gone already."""
    done = {key for key, reason in progress.rejected if reason.partition(":")[0] == KIND}
    new = [(key, f"{KIND}: of {original}") for key, original in drops.items() if key not in done]
    if not new:
        return
    assert progress.entry is not None
    dataset = _dataset(path, progress.entry)
    shard = OpenShard(path)
    try:
        counts = zip(dataset.num_image_tokens.tolist(), dataset.num_text_tokens.tolist(), strict=True)
        for sample, (num_image_tokens, num_text_tokens) in zip(_samples(dataset), counts, strict=True):
            if sample.key not in drops:
                shard.add(sample, num_image_tokens, num_text_tokens)
    except BaseException:
        shard.drop()
        raise
    shard.close(progress.source, (*progress.rejected, *new), progress.num_read, progress.cut)


def _dataset(path: Path, entry: ShardEntry) -> ShardDataset:
    """A data set of one shard."""
    manifest = Manifest(FORMAT_VERSION, "", (entry,), None, entry.num_samples, 0)
    return ShardDataset(path.parent, manifest, [open_shard(path.parent, entry)])


def _samples(dataset: ShardDataset) -> Iterator[Sample]:
    for start in range(0, len(dataset), SAMPLES_AT_ONCE):
        yield from dataset.read(range(start, min(start + SAMPLES_AT_ONCE, len(dataset))))
