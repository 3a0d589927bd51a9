"""Shards: WebDataset tars with an index and a manifest (contract 1). The public names in one place.

Format: data/shard_index.py. Writing, resumable: data/shard_writer.py. Reading by index:
data/shard_reader.py. Verifying: data/verify.py.
"""

from data.shard_file import OpenShard
from data.shard_index import LatentInfo, Manifest, Sample, ShardEntry, ShardProgress
from data.shard_reader import ShardDataset
from data.shard_writer import (
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
from data.verify import verify

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
