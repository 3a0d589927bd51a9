"""Writes index and manifest for shards of others (webdataset's ShardWriter, img2dataset), to read them in place.

The tars stay unchanged. Their headers are checked strictly, because no expected count exists to compare with. Readers
apply the EXIF orientation of photographs (data.samples.images.to_rgb).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from base import limits
from base.config import UserError
from base.progress import ProgressLine
from data.shards.file import write_index, write_progress
from data.shards.index import (
    FORMAT_VERSION,
    KEY_PATTERN,
    MAX_PARTS,
    PART_PATTERN,
    RECORD,
    Manifest,
    ShardProgress,
    key_hash,
    sample_crc32,
)
from data.shards.writer import finished_shard, write_manifest
from data.sources.base import BadItemError
from data.sources.tar_file import TarReader
from data.sources.tar_samples import Group, groups

MAX_HEADER_BLOCKS = 255  # one byte in the record
Record = tuple[int, int, list[int], list[int], int, int, int]  # the fields of RECORD


def index_shards(directory: Path) -> Manifest:
    """Writes index and side file of every *.tar in `directory`, in the order of names, and returns the new manifest.

    Skips shards that an earlier run indexed, if their sizes are unchanged. Raises UserError: no tars, a damaged tar, a
    sample that our reader cannot address (the message names it), or a repeated key.
    """
    directory = directory.resolve()
    paths = sorted(path for path in directory.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise UserError(f"{directory}: no *.tar there; give the folder that holds the shards")
    source = f"index of existing shards in {directory.name}"
    sizes = np.cumsum([path.stat().st_size for path in paths])
    progress, count = ProgressLine(f"index of {directory.name}", "samples"), 0
    for path, done_bytes in zip(paths, sizes.tolist(), strict=True):
        shard = finished_shard(path, source=source) or _index(path, source)
        count += shard.num_read
        progress.show(count, done_bytes / max(1, sizes[-1]))
    return write_manifest(directory, [path.name for path in paths], source=source)


def _index(path: Path, source: str) -> ShardProgress:
    with TarReader(path) as tar:
        found = [_record(tar, group) for group in groups(tar)]
    entry = write_index(path, np.array(found, RECORD)) if found else None
    progress = ShardProgress(FORMAT_VERSION, source, entry, (), len(found))
    write_progress(path, progress)
    return progress


def _record(tar: TarReader, group: Group | BadItemError) -> Record:
    """The index record of one sample. Raises UserError: our reader could not find the sample by it."""
    if isinstance(group, BadItemError):
        raise _unfit(tar, group.reason)
    key, members = group.key, list(group.parts.values())
    if not KEY_PATTERN.fullmatch(key):
        raise _unfit(tar, f"key '{key}' is not 1 to 64 of A-Z a-z 0-9 _ -")
    if len(members) > MAX_PARTS:
        raise _unfit(tar, f"sample '{key}' has {len(members)} parts, more than {MAX_PARTS}")
    position = members[0].offset
    for part, member in group.parts.items():
        if not PART_PATTERN.fullmatch(part) or member.name != f"{key}.{part}" or member.is_renamed:
            raise _unfit(tar, f"'{member.name}' is no KEY.part in small letters that fits a plain header")
        if not 1 <= member.num_bytes <= limits.IMAGE_BYTES:
            raise _unfit(tar, f"'{member.name}' has {member.num_bytes} bytes, not 1 to {limits.IMAGE_BYTES}")
        if member.offset != position or member.header_blocks > MAX_HEADER_BLOCKS:
            raise _unfit(tar, f"something lies before '{member.name}', inside its sample")
        position = member.end
    blank = [0] * (MAX_PARTS - len(members))
    part_bytes = [member.num_bytes for member in members]
    header_blocks = [member.header_blocks for member in members]
    crc = sample_crc32(key, {part: tar.payload(member) for part, member in group.parts.items()})
    return key_hash(key), members[0].offset, part_bytes + blank, header_blocks + blank, 0, 0, crc


def _unfit(tar: TarReader, reason: str) -> UserError:
    return UserError(
        f"{tar.path}: {reason}, so it cannot be read in place; copy it with `launch/make_shards.py webdataset`"
    )
