"""Fingerprints of a training's inputs, which all ranks compare: data sets, and the files that the config names.

A data set's manifest holds the hash of every shard and index. Each rank has checked its index files against it when it
opened the set, and checks every sample that it reads. Weights take gigabytes: their size and some blocks are compared.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from base import files, limits
from base.config import flatten
from base.objective import Objective
from data.plan.mixture import Mixture
from data.shards.index import MANIFEST_NAME

NAMED_BY = {
    "autoencoder",
    "init",
    "init_from",
    "preview_shards",
    "prompts",
    "shards",
    "text_tokenizer",
    "vgg16_weights",
    "weights",
}
"""Fields of a run's config that name files or folders to read. A value that is no path on this host is a hub's name."""
DATA = "data."
"""Section of the data sets, which are compared by their manifests."""
NUM_FILES = 32
NUM_BLOCKS, BLOCK_BYTES = 16, 1 << 16
DIGITS = 12


def facts(config: Mapping[str, Any], mixture: Mixture, objective: Objective) -> dict[str, dict[str, str]]:
    """Fingerprints of the data sets and of the model's start, by kind (launch.runs.nodes.REMEDIES), then by name.

    `config`: the run's resolved config.
    """
    sets = {
        f"{member.name or 'shards'} ({member.dataset.directory})": (
            f"{len(member)} samples, fingerprint {member.fingerprint[:DIGITS]}"
        )
        for member in mixture.members
    }
    weights = {name: value[:DIGITS] for name, value in objective.fingerprints().items()}
    for key, value in flatten(config).items():
        if key.rpartition(".")[2] in NAMED_BY and not key.startswith(DATA):
            weights |= {f"{key} ({name})": found for name, found in _samples(Path(value).expanduser())}
    return {"data": sets, "weights": weights}


def _samples(path: Path) -> Iterator[tuple[str, str]]:
    """Yields (file, fingerprint) for a file, or for up to NUM_FILES + 2 files of a folder; for shards, the manifest."""
    if path.is_file():
        yield str(path), _sample(path)
    elif (path / MANIFEST_NAME).is_file():
        yield str(path / MANIFEST_NAME), _sample(path / MANIFEST_NAME)
    elif path.is_dir():
        names = sorted(
            os.path.relpath(os.path.join(folder, name), path)  # noqa: PTH118
            for folder, _, found in os.walk(path)
            for name in found
            if not name.startswith(".")
        )
        yield f"names in {path}", f"{len(names)} files, {files.digest(names)[:DIGITS]}"
        drawn = sorted(names, key=lambda name: hashlib.sha256(name.encode(errors="replace")).digest())
        for name in sorted({*names[:1], *names[-1:], *drawn[:NUM_FILES]}):
            yield str(path / name), _sample(path / name)


def _sample(path: Path) -> str:
    """A file's size, and a digest of some blocks from the first to the last; of a small file, of all bytes."""
    digest = hashlib.sha256()
    with limits.open_file(path) as file:
        size = file.seek(0, os.SEEK_END)
        last = max(size - BLOCK_BYTES, 0)
        for block in range(NUM_BLOCKS):
            file.seek(last * block // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return f"{size} bytes, {digest.hexdigest()[:DIGITS]}"
