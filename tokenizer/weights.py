"""Weights in safetensors: strict loading with one clear line, and hashes that identify them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from base import limits
from base.config import UserError, describing

MAX_NAMES_IN_MESSAGE = 4
MOST_UNSAVED = 4
"""A model may register this many times the saved values while it is built: norms are replaced, heads dropped."""
DRAWS = {"normal_", "uniform_", "kaiming_uniform_"}
"""Functions that fill a tensor with random values."""
M = TypeVar("M", bound=nn.Module)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU. Raises UserError: missing or damaged file."""
    try:
        limits.check_regular(path)
        tensors: dict[str, Tensor] = load_file(str(path))
        return tensors
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such weights file; check the path or run the stage that writes it"
        ) from None
    except (SafetensorError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: not a readable safetensors file ({reason}); write it again") from None


def write_tensors(path: str | Path, module: nn.Module) -> None:
    """The module's parameters and persistent buffers as safetensors (one name per tensor, no pickle).

    Raises OSError: the disk is full, or fails.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}
    save(tensors, path)


def save(tensors: dict[str, Tensor], path: str | Path) -> None:
    """Writes contiguous CPU tensors. Raises OSError; safetensors' own error names the cause only in its text."""
    try:
        save_file(tensors, str(path), metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def load_exact(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies `tensors` into `module`. Raises UserError naming tensors that are missing, unexpected or mis-shaped."""
    own = module.state_dict()
    wrong_shape = [
        f"{name} {list(tensors[name].shape)} instead of {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tensors[name].shape != own[name].shape
    ]
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "of another shape": wrong_shape,
    }
    if any(problems.values()):
        listed = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
        raise UserError(f"{where}: does not fit the configured model ({listed})")
    module.load_state_dict(dict(tensors))


def load_model(build: Callable[[], M], tensors: Mapping[str, Tensor], where: str, config: str | Path) -> M:
    """Returns the model that `build` makes from the file `config`, filled with `tensors`.

    Raises UserError: a model with more parameters than `tensors` can fill, tensors that do not fit, a config from which
    no model can be built.
    """
    with describing(config):
        check_fits(build, tensors, where)
        model = build()
    load_exact(model, tensors, where)
    return model


def check_fits(build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError when `build` makes more parameters than `tensors` can fill. Allocates none."""
    with shapes_only(), _at_most(MOST_UNSAVED * sum(map(Tensor.numel, tensors.values())), where):
        build()


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, models are built on the meta device: with shapes, without values or memory."""
    with torch.device("meta"), _WithoutDraws():
        yield


class _WithoutDraws(TorchFunctionMode):
    """Leaves out draws of initial weights. On the meta device a draw would load torch's compiler, which takes 2 s."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def _at_most(num_values: int, where: str) -> Iterator[None]:
    """Context in which this thread builds a model. Raises UserError: parameters of more than `num_values` values."""
    builder, found = threading.get_ident(), 0

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal found
        if parameter is not None and threading.get_ident() == builder:
            found += parameter.numel()
            if found > num_values:
                raise UserError(
                    f"{where}: its config describes a model of more values than the weights hold, over the limit of "
                    f"{num_values:,}; they do not belong together"
                )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def state_hash(*modules: nn.Module) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of every parameter and persistent buffer.

    A tensor on the meta device, where a model is built to be measured, has no bytes.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            if tensor.is_meta:
                continue
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def freeze(module: nn.Module) -> None:
    """Turns gradients off for every parameter and sets evaluation mode."""
    module.requires_grad_(False)
    module.eval()


def _some(names: Iterable[str]) -> str:
    names = list(names)
    rest = len(names) - MAX_NAMES_IN_MESSAGE
    return ", ".join(names[:MAX_NAMES_IN_MESSAGE]) + (f" and {rest} more" if rest > 0 else "")


def usable(device: str | torch.device) -> torch.device:
    """The torch device named `device`. Raises UserError: it cannot be used on this machine."""
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0][:160]
        raise UserError(
            f"device '{device}' cannot be used here ({reason}); give 'cpu', or repair the driver"
        ) from None
    return found
