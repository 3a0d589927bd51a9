"""The shard format: names, records and manifest, which the writer and the reader share.

shard-000000.tar         plain WebDataset tar (USTAR, mtime 0): KEY.part members, parts in sorted order
shard-000000.index.npy   one RECORD per sample
shard-000000.json        ShardProgress: written last; a shard without it does not count. Without a tar beside it, every
                         input of this shard was rejected
rejected.jsonl           {"key", "reason"} of every input that was not written
manifest.json            Manifest: written when all shards are finished
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from isal import isal_zlib  # zlib's CRC-32, 4 times as fast

from base import files
from base.config import ConfigError, UserError, from_dict

FORMAT_VERSION = 2
TAR_BLOCK_BYTES = 512
MAX_PARTS = 8
MAX_PART_BYTES = (1 << 32) - 1
MANIFEST_NAME = "manifest.json"
REJECTED_NAME = "rejected.jsonl"
LATENT_DTYPES = ("bf16", "fp16", "fp32")

KEY_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # WebDataset cuts a name at its first dot
PART_PATTERN = re.compile(r"(?=.{1,32}$)[a-z0-9_]+(\.[a-z0-9_]+)*")  # KEY.part fits a USTAR name of 100

RECORD = np.dtype(
    [
        ("key_hash", "<u8"),  # first 8 bytes of SHA-256 of the key
        ("offset", "<u8"),  # byte of the sample's first tar header
        ("part_bytes", "<u4", (MAX_PARTS,)),  # payload lengths in file order; 0 = no such part
        ("header_blocks", "<u1", (MAX_PARTS,)),  # tar blocks before each payload: 1; more in PAX tars
        ("num_image_tokens", "<u4"),  # of all its images, each as often as the layout names it
        ("num_text_tokens", "<u4"),  # of its longest caption, or of all its splits
        ("crc32", "<u4"),  # over name and payload of every part: sample_crc32
    ]
)
Records = npt.NDArray[np.void]


@dataclass(frozen=True)
class Sample:
    """One sample. `parts` maps a part name without the key ("png", "source.latent", "json") to its bytes."""

    key: str
    parts: Mapping[str, bytes]
    shard: str = field(default="", compare=False)  # file from which it was read, for messages

    @property
    def where(self) -> str:
        """Shard and key in words, for messages."""
        return f"{self.shard}: sample '{self.key}'" if self.shard else f"sample '{self.key}'"


@dataclass(frozen=True)
class LatentInfo:
    """Format and statistics of a data set's latents.

    A latent part holds raw values [num_views, M, C, Y, X], where M = 2 (mean, log variance) with `has_logvar`, else 1
    (mean). Training uses (z - mean) / std of one view.
    """

    dtype: str  # "bf16" | "fp16" | "fp32", little-endian
    shape: tuple[int, int, int]  # C, Y, X
    mean: tuple[float, ...]  # per channel, over the data set
    std: tuple[float, ...]  # per channel, > 0
    tokenizer_fingerprint: str  # of the autoencoder's config and weights
    text_tokenizer_fingerprint: str  # of the tokenizer that counted num_text_tokens; "" for class labels
    num_views: int = 1  # crops and flips of one image, in one part
    has_logvar: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in LATENT_DTYPES:
            raise ConfigError(f"latent dtype '{self.dtype}': choose one of {', '.join(LATENT_DTYPES)}")
        channels = self.shape[0]
        if len(self.mean) != channels or len(self.std) != channels:
            raise ConfigError(f"latent statistics: expected {channels} channels, not {len(self.mean)}")
        if self.num_views < 1:
            raise ConfigError(f"latent num_views is {self.num_views}; at least 1")
        with np.errstate(over="ignore"):  # checked in fp32, in which they are used: 1e-60 is 0, 1e60 infinite
            mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        if not np.isfinite([mean, std]).all() or std.min() <= 0:
            raise ConfigError(
                "latent statistics: mean and std must be finite and std positive in every channel"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of one stored latent part with all its views."""
        values = self.num_views * (2 if self.has_logvar else 1) * int(np.prod(self.shape))
        return values * (4 if self.dtype == "fp32" else 2)


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard."""

    name: str  # "shard-000000.tar"
    num_bytes: int
    num_samples: int
    sha256: str
    index_sha256: str

    @property
    def index_name(self) -> str:
        """Name of the shard's index file."""
        return index_name(self.name)


@dataclass(frozen=True)
class Cut:
    """Counts of the images that a crop fitted to a square."""

    num_images: int = 0  # images fitted by a crop
    num_cut: int = 0  # those that lost more than data.sources.prepare.CUT_AREA of their area

    def __add__(self, other: Cut) -> Cut:
        return Cut(self.num_images + other.num_images, self.num_cut + other.num_cut)


@dataclass(frozen=True)
class ShardProgress:
    """A shard's side file, which accounts for its inputs: num_read = samples + rejected."""

    format_version: int
    source: str
    entry: ShardEntry | None  # None: every input was rejected, and there is no tar
    rejected: tuple[tuple[str, str], ...]  # (key, reason)
    num_read: int  # number of inputs that the source yielded
    cut: Cut | None = None  # None: no image was fitted by a crop

    def __post_init__(self) -> None:
        num_samples = 0 if self.entry is None else self.entry.num_samples
        if self.num_read != num_samples + len(self.rejected):
            raise ConfigError(
                f"read {self.num_read} inputs, but wrote {num_samples} and rejected {len(self.rejected)}"
            )


@dataclass(frozen=True)
class Manifest:
    """A finished data set. `fingerprint` is a digest of all other fields."""

    format_version: int
    source: str  # where the samples come from, free text
    shards: tuple[ShardEntry, ...]
    latent: LatentInfo | None  # None for pixels
    num_samples: int
    num_rejected: int
    fingerprint: str = ""

    def digest(self) -> str:
        """The fingerprint of this manifest's other fields."""
        return files.digest(dataclasses.asdict(dataclasses.replace(self, fingerprint="")))

    @staticmethod
    def read(directory: Path) -> Manifest:
        """Reads manifest.json. Raises UserError: it is missing, damaged or of a newer version, or has no samples."""
        path = directory / MANIFEST_NAME
        if not path.is_file():
            raise UserError(
                f"{path}: no such data set; write it first (launch/make_shards.py, encode_latents.py)"
            )
        manifest: Manifest = parse(Manifest, path)
        if manifest.fingerprint != manifest.digest():
            raise UserError(
                f"{path}: was changed after it was written; run the writer again, finished shards are kept"
            )
        if manifest.num_samples == 0:
            raise UserError(f"{path}: the data set is empty; see {directory / REJECTED_NAME} for the reasons")
        return manifest


def parse(cls: type[Any], path: Path) -> Any:
    """Reads a `Manifest` or a `ShardProgress` (`cls`) from `path`.

    Raises UserError: not JSON, other fields, or a newer format version.
    """
    try:
        tree = files.read_json(path)
        version = tree["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not readable; delete it and run the writer again") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path}: format version {version}, this program reads {FORMAT_VERSION}; update the program"
        )
    return from_dict(cls, tree, where=str(path))


def index_name(shard_name: str) -> str:
    """shard-000000.tar -> shard-000000.index.npy"""
    return shard_name.removesuffix(".tar") + ".index.npy"


def progress_name(shard_name: str) -> str:
    """shard-000000.tar -> shard-000000.json"""
    return shard_name.removesuffix(".tar") + ".json"


def key_hash(key: str) -> int:
    """First 8 bytes of the key's SHA-256, little-endian."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")


def sample_crc32(key: str, parts: Mapping[str, bytes]) -> int:
    """CRC-32 over `KEY.part`, payload, `KEY.part`, payload, ... in the order of sorted part names."""
    return members_crc32([(f"{key}.{part}".encode(), payload) for part, payload in parts.items()])


def members_crc32(members: Iterable[tuple[bytes, bytes]]) -> int:
    """`sample_crc32` from a sample's tar members, each (`KEY.part`, payload), in any order."""
    crc = 0
    for name, payload in sorted(members, key=_name):
        crc = isal_zlib.crc32(payload, isal_zlib.crc32(name, crc))
    return crc


_name = operator.itemgetter(0)


def extents(records: Records) -> npt.NDArray[np.int64]:
    """Bytes of each sample in the tar, with headers and padding, int64 [len(records)]."""
    part_bytes = records["part_bytes"].astype(np.int64)
    blocks = records["header_blocks"] + -(-part_bytes // TAR_BLOCK_BYTES)  # both are 0 for a missing part
    return np.asarray(blocks.sum(axis=1) * TAR_BLOCK_BYTES, dtype=np.int64)
