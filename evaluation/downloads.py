"""Downloads published files once and checks their hash (tokenizer/releases/checkpoint.py reads them)."""

from __future__ import annotations

from pathlib import Path

import torch

from base import files
from base.config import UserError


def fetch(url: str, sha256: str | None, instead: str, name: str | None = None) -> Path:
    """The file behind `url`, kept in torch.hub's cache; `sha256` None: no hash is known and none is checked.

    `name` is the file's in the cache (default: the address's last part). Raises UserError: a failed download or another
    content; `instead` says what a person can do.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / (name or url.rpartition("/")[2])
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no network, or a wrong hash
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{url} cannot be had ({reason}); {instead}") from None
    if sha256 is not None and files.sha256(path) != sha256:
        raise UserError(f"{path}: is not the published file (sha256 differs); remove it, or {instead}")
    return path
