"""Published files: fetched once, checked by hash, read without running code that stands in them."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine import files
from engine.config import UserError


def fetch(url: str, sha256: str | None, instead: str) -> Path:
    """The file behind `url`, kept in torch.hub's cache; `sha256` None: its hash is not known.

    Raises UserError when it cannot be had or is another file; `instead` says what a person can do.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=False)
        except (OSError, RuntimeError) as error:  # no network; a hash that does not fit
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{url} cannot be had ({reason}); {instead}") from None
    if sha256 is not None and files.sha256(path) != sha256:
        raise UserError(f"{path}: is not the published file (sha256 differs); remove it, or {instead}")
    return path


def read_pth(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a .pth file that holds a plain state dict. Raises UserError for anything else."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; check the path") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not a readable file of weights ({reason}); fetch it again") from None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds more than tensors by name; give a plain state dict")
    return dict(state)
