"""Shards: WebDataset tars with an index and a manifest (contract 1). The public names in one place.

Format: data/shard_index.py. Writing, resumable: data/shard_writer.py. Reading by index, verifying:
data/shard_reader.py.
"""

from data.shard_index import LatentInfo, Manifest, Sample, ShardEntry
from data.shard_reader import ShardDataset, verify
from data.shard_writer import ShardWriter, finished_shard, shard_name, write_manifest, write_shard

__all__ = [
    "LatentInfo",
    "Manifest",
    "Sample",
    "ShardDataset",
    "ShardEntry",
    "ShardWriter",
    "finished_shard",
    "shard_name",
    "verify",
    "write_manifest",
    "write_shard",
]
