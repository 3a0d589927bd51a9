"""Weight files of other projects, read as tensors only: nothing that stands in them is executed."""

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

# Where a training checkpoint keeps the weights; averaged weights are what its authors evaluate.
WEIGHT_KEYS = ("ema", "model", "state_dict")
MAX_DEPTH = 8  # of such entries in each other
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a file."""

    where: str
    """The file, and the entry of it that was read."""
    tensors: Mapping[str, Tensor]
    """By their names, without the prefixes of wrappers; on the CPU."""


def read_checkpoint(path: str | Path) -> Checkpoint:
    """A safetensors file, or what torch.save wrote of tensors (.pt, .pth, .bin, .ckpt).

    A dict in a dict is opened at `ema`, else `model`, else `state_dict`. Raises UserError: no such file, a
    damaged one, one that holds more than tensors and plain values, no weights in it.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return Checkpoint(str(path), read_tensors(path))
    tree, where = _load(path), str(path)
    for _ in range(MAX_DEPTH):  # one may hold itself
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
    except Exception as error:  # the unpickler of torch fails on strange bytes with whatever it stumbles over
        found = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        reason = " ".join(found.split())[:120]
        raise UserError(f"{path}: not a readable weights file ({reason}); fetch it again") from None


def _unwrapped(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.partition(".")[2]
    return name
