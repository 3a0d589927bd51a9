"""Weight files of other projects, read as tensors only: no code in a file is executed."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from base import limits
from base.config import UserError
from tokenizer.weights import read_tensors

# Keys under which a training checkpoint keeps its weights; `ema` first, the averaged weights that authors evaluate.
WEIGHT_KEYS = ("ema", "model", "state_dict")
MAX_DEPTH = 8  # nested WEIGHT_KEYS that are opened
WRAPPERS = ("module.", "_orig_mod.")  # prefixes that DistributedDataParallel and torch.compile add


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file."""

    where: str
    """The file, and the entry of it that was read."""
    tensors: Mapping[str, Tensor]
    """Tensors on the CPU by name, without the wrappers' prefixes."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Reads a safetensors file, or tensors that torch.save wrote (.pt, .pth, .bin, .ckpt).

    A dict in a dict is opened at `ema`, else `model`, else `state_dict`. Raises UserError: no such file, a damaged
    file, objects other than tensors and plain values, no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Checkpoint(str(path), read_tensors(path))
    tree, where = _load(path), str(path)
    for _ in range(MAX_DEPTH):  # bounded, as a dict may hold itself
        key = next(
            (key for key in WEIGHT_KEYS if isinstance(tree, Mapping) and isinstance(tree.get(key), Mapping)),
            None,
        )
        if key is None:
            break
        assert isinstance(tree, Mapping)
        tree, where = tree[key], f"{where}, entry '{key}'"
    if not isinstance(tree, Mapping) or not tree:
        raise UserError(f"{where}: holds no weights by name; give a state dict")
    others = [str(name) for name, value in tree.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(
            f"{where}: holds more than tensors ({', '.join(others[:4])}); give a plain state dict"
        )
    return Checkpoint(where, {_unwrapped(str(name)): tensor for name, tensor in tree.items()})


def _load(path: Path) -> object:
    try:
        limits.check_regular(path)
        # Mapped, not read: a checkpoint with optimizer states is larger than the weights that are wanted.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise UserError(f"{path}: no such weights file; check the path") from None
    except pickle.UnpicklingError:
        with limits.open_file(path) as file:
            is_pickle = file.read(1) == pickle.PROTO
        if not zipfile.is_zipfile(path) and not is_pickle:
            raise UserError(f"{path}: not a readable weights file (a web page?); fetch it again") from None
        raise UserError(
            f"{path}: holds more than tensors, and reading it would run code of its authors; "
            "save its state dict as safetensors first"
        ) from None
    except Exception as error:  # torch's unpickler raises any kind of exception on strange bytes
        found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(found.split())[:120]
        raise UserError(f"{path}: not a readable weights file ({reason}); fetch it again") from None


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
