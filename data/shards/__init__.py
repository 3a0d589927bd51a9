"""Shards: WebDataset tars with an index and a manifest (docs/architecture.md, section 1); the public names.

Format: data/shards/index.py. Writing, resumable: data/shards/writer.py. Reading by index:
data/shards/reader.py. Verifying: data/shards/verification.py.
"""

from data.shards.file import OpenShard
from data.shards.index import LatentInfo, Manifest, Sample, ShardEntry, ShardProgress
from data.shards.reader import ShardDataset
from data.shards.verification import verify
from data.shards.writer import (
    MAKE_SHARDS,
    SHARD_FILES,
    ShardWriter,
    check_shards,
    claim_shards,
    finished_shard,
    shard_name,
    write_manifest,
    write_shard,
)

__all__ = [
    "MAKE_SHARDS",
    "SHARD_FILES",
    "LatentInfo",
    "Manifest",
    "OpenShard",
    "Sample",
    "ShardDataset",
    "ShardEntry",
    "ShardProgress",
    "ShardWriter",
    "check_shards",
    "claim_shards",
    "finished_shard",
    "shard_name",
    "verify",
    "write_manifest",
    "write_shard",
]
