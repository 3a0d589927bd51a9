"""Writes shards that are whole or absent, and continues after a killed run."""

from __future__ import annotations

import dataclasses
import json
import tarfile
import types
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from base import files
from base.config import UserError
from data.shards.file import OpenShard, Rejections
from data.shards.index import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    REJECTED_NAME,
    TAR_BLOCK_BYTES,
    LatentInfo,
    Manifest,
    Sample,
    ShardEntry,
    ShardProgress,
    index_name,
    parse,
    progress_name,
)

MAKE_SHARDS = "make_shards"
SHARD_FILES = (
    *("shard-*", ".shard-*", MANIFEST_NAME, REJECTED_NAME),
    *("captions.sqlite", ".captions.sqlite*", ".node-*.lock", ".deduplicating", "moments"),
)
"""Patterns of all file names that our commands write into a folder of shards."""


def claim_shards(directory: Path, command: str) -> None:
    """Marks the folder as one into which `command` may write shards. Raises UserError: as base.files.claim.

    Earlier versions left no marker: their folders are recognised by a shard's side file or by make_shards' lock.
    """
    files.claim(directory, command, SHARD_FILES, lambda folder: _has_shards_of(folder, command))


def check_shards(directory: Path, command: str) -> None:
    """Raises UserError: `claim_shards` would. Writes nothing."""
    files.check_claim(directory, command, SHARD_FILES, lambda folder: _has_shards_of(folder, command))


def _has_shards_of(directory: Path, command: str) -> bool:
    patterns = (".node-*.lock", ".captions.sqlite.lock") if command == MAKE_SHARDS else ()
    locks = [lock for pattern in patterns for lock in directory.glob(pattern)]
    return any(lock.is_file() and not lock.stat().st_size for lock in locks) or any(
        map(_is_side, directory.glob("shard-*.json"))
    )


def _is_side(path: Path) -> bool:
    try:
        parse(ShardProgress, path)
    except (UserError, OSError):
        return False
    return True


def shard_name(number: int) -> str:
    """7 -> shard-000007.tar"""
    return f"shard-{number:06d}.tar"


class ShardWriter:
    """Writes samples into numbered shards of a directory, and the manifest at the end. Use as a context manager.

    A killed run leaves finished shards only. A writer opened again on the directory counts them, and a deterministic
    source skips its first `num_consumed` items (written or rejected). Leaving the block normally closes the last shard
    and writes rejected.jsonl and manifest.json; an exception drops the unfinished shard. Equal items give equal bytes.
    """

    def __init__(
        self, directory: Path, *, max_samples_per_shard: int, source: str, latent: LatentInfo | None = None
    ) -> None:
        if max_samples_per_shard < 1:
            raise UserError(f"max_samples_per_shard is {max_samples_per_shard}; give at least 1")
        self.directory = Path(directory)
        self.source = source
        self._latent = latent
        self._max_samples_per_shard = max_samples_per_shard
        self._shard: OpenShard | None = None
        self._rejected: list[tuple[str, str]] = []  # since the last finished shard
        claim_shards(self.directory, "shard_writer")
        finished = _finished(self.directory, source)
        for side in _after_gap(self.directory, len(finished)):
            side.unlink()  # the writer follows the source's order, so shards after a lost one are rewritten
        self._num_shards = len(finished)
        self.num_written = sum(shard.num_read - len(shard.rejected) for shard in finished)
        self.num_rejected = sum(len(shard.rejected) for shard in finished)

    @property
    def num_consumed(self) -> int:
        """Number of the source's items, in order, that the directory already accounts for."""
        return self.num_written + self.num_rejected

    def write(self, sample: Sample, num_image_tokens: int = 0, num_text_tokens: int = 0) -> None:
        """Adds a sample. `num_text_tokens`: of its longest caption, without <|im_start|> and <|im_end|>.

        Raises UserError: a key or part name that WebDataset cannot carry, an empty part, or a repeated key.
        """
        if self._shard is None:
            self._shard = OpenShard(self.directory / shard_name(self._num_shards))
        self._shard.add(sample, num_image_tokens, num_text_tokens)
        self.num_written += 1
        if self._shard.num_samples == self._max_samples_per_shard:
            self._close_shard()

    def reject(self, key: str, reason: str) -> None:
        """Records that the source's next item is not written, and why."""
        self._rejected.append((key, reason))
        self.num_rejected += 1

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: types.TracebackType | None,
    ) -> None:
        if error is not None:
            if self._shard is not None:
                self._shard.drop()
            return
        if self._shard is not None:
            self._close_shard()
        elif self._rejected:
            self._shard = OpenShard(self.directory / shard_name(self._num_shards))
            self._close_shard()
        names = [shard_name(number) for number in range(self._num_shards)]
        write_manifest(self.directory, names, source=self.source, latent=self._latent)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shard.close(self.source, tuple(self._rejected))
        self._shard = None
        self._rejected = []
        self._num_shards += 1


def write_shard(
    path: Path,
    samples: Iterable[Sample],
    token_counts: Iterable[tuple[int, int]],
    *,
    source: str,
    rejected: Rejections = (),
) -> ShardEntry | None:
    """Writes one shard: temporary name, fsync, re-scan, rename, then the index and the side file.

    `token_counts`: (num_image_tokens, num_text_tokens) of each sample; `rejected`: (key, reason) of each input that is
    not written. The caller numbers the shards (`shard_name`) and finally calls `write_manifest` with an equal `source`.
    Returns None if there is no sample; then no tar is written.
    """
    files.make_directory(path.parent)
    shard = OpenShard(path)
    try:
        for sample, (num_image_tokens, num_text_tokens) in zip(samples, token_counts, strict=True):
            shard.add(sample, num_image_tokens, num_text_tokens)
    except BaseException:
        shard.drop()
        raise
    return shard.close(source, rejected)


def finished_shard(path: Path, *, source: str) -> ShardProgress | None:
    """The side file of a finished shard at `path`; None: the shard is not finished.

    Checks sizes and the index. Raises UserError: the shard was made from another source.
    """
    side = path.with_name(progress_name(path.name))
    if not side.is_file():
        return None
    progress: ShardProgress = parse(ShardProgress, side)
    if progress.source != source:
        raise UserError(f"{side}: was made from '{progress.source}', not '{source}'; use an empty directory")
    if progress.entry is None:
        return progress
    if not path.is_file() or path.stat().st_size != progress.entry.num_bytes:
        return None
    index = path.with_name(index_name(path.name))
    return progress if index.is_file() and files.sha256(index) == progress.entry.index_sha256 else None


def write_manifest(
    directory: Path, names: Sequence[str], *, source: str, latent: LatentInfo | None = None
) -> Manifest:
    """Writes the manifest of the finished shards `names`, in this order, and gathers their rejected inputs.

    Raises UserError: a shard is missing, truncated or of another source, there is no sample, or a key occurs twice.
    """
    finished: list[ShardProgress] = []
    for name in names:
        progress = finished_shard(directory / name, source=source)
        if progress is None:
            raise UserError(f"{directory / name}: missing or cut short; run the writer again")
        finished.append(progress)
    rejected = [item for shard in finished for item in shard.rejected]
    lines = [json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in rejected]
    files.write_text(directory / REJECTED_NAME, "".join(lines))
    entries = tuple(shard.entry for shard in finished if shard.entry is not None)
    if not entries:
        first = f" (the first: {rejected[0][1]})" if rejected else ""
        raise UserError(
            f"{directory}: no sample written, {len(rejected)} rejected; see {directory / REJECTED_NAME}{first}"
        )
    indices = [np.load(directory / entry.index_name) for entry in entries]
    hashes = np.concatenate([index["key_hash"] for index in indices])
    order = np.argsort(hashes, kind="stable")
    repeated = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
    if len(repeated):
        ends = np.cumsum([entry.num_samples for entry in entries])
        places = order[repeated[0] : repeated[0] + 2].tolist()
        shards = [int(np.searchsorted(ends, place, side="right")) for place in places]
        first, second = (entries[shard].name for shard in shards)
        key = _key(directory / first, indices[shards[0]][places[0] - ends[shards[0]]])  # from the shard's end
        raise UserError(
            f"{directory}: {len(repeated)} keys used twice, the first is '{key}' in {first} and {second}; make keys "
            "unique"
        )
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        source=source,
        shards=entries,
        latent=latent,
        num_samples=len(hashes),
        num_rejected=len(rejected),
    )
    manifest = dataclasses.replace(manifest, fingerprint=manifest.digest())
    files.write_json(directory / MANIFEST_NAME, dataclasses.asdict(manifest))
    return manifest


def _key(shard: Path, record: np.void) -> str:
    """The key of a sample, from the header of its first part."""
    with shard.open("rb") as file:
        file.seek(int(record["offset"]) + (int(record["header_blocks"][0]) - 1) * TAR_BLOCK_BYTES)
        header = file.read(TAR_BLOCK_BYTES)
    return tarfile.TarInfo.frombuf(header, "utf-8", "replace").name.partition(".")[0]


def _finished(directory: Path, source: str) -> list[ShardProgress]:
    """Side files of the finished shards 0, 1, ..., up to the first missing, truncated or unfinished shard."""
    finished: list[ShardProgress] = []
    while (progress := finished_shard(directory / shard_name(len(finished)), source=source)) is not None:
        finished.append(progress)
    return finished


def _after_gap(directory: Path, num_finished: int) -> list[Path]:
    """Paths of side files of shards after the first unfinished one."""
    gap = progress_name(shard_name(num_finished))
    return sorted(side for side in directory.glob("shard-*.json") if side.name > gap and _is_side(side))
