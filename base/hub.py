"""The only access to other people's models, processors, configs and tokenizers, in a folder or on the Hugging Face hub.

Code that comes with a model is never run, and no prompt offers to run it. Whether the hub can be reached is checked
once, so that no later call waits in vain.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from base import limits
from base.errors import UserError
from base.model_sizes import check_sizes

T = TypeVar("T")


def from_pretrained(cls: Any, source: str, **arguments: Any) -> Any:
    """`cls.from_pretrained(source, **arguments)` for a class of transformers; `source`: a folder or a name on the hub.

    Raises OSError: `source` cannot be obtained. Raises ValueError: transformers cannot read the files, or they need
    code of their own.
    """
    offline_if_unreachable()
    if Path(source).is_dir():
        _check_folder(Path(source))
    return _in_a_sentence(lambda: cls.from_pretrained(source, trust_remote_code=False, **arguments))


@contextlib.contextmanager
def described(what: str) -> Iterator[None]:
    """Context for `from_pretrained`. `what`: the model, for people. Raises UserError, in one line: it fails."""
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{what} cannot be had ({reason}); give a folder with it") from None


def from_config(cls: Any, config: Any, **arguments: Any) -> Any:
    """A model with random weights, from an Auto class of transformers. Raises ValueError: it needs code of its own."""
    check_sizes(config.to_dict(), type(config).__name__)
    return cls.from_config(config, trust_remote_code=False, **arguments)


def create_timm(name: str, *, pretrained: bool, **arguments: Any) -> Any:
    """`timm.create_model(name)`, which may download weights if `pretrained`. Raises what timm raises."""
    import timm  # imported here because it takes a second

    if pretrained:
        offline_if_unreachable()
    return timm.create_model(name, pretrained=pretrained, **arguments)


def folder(source: str | Path, patterns: Sequence[str], revision: str | None = None) -> Path:
    """`source` if it is a folder, else one with the files of the repository `source` whose names match `patterns`.

    Raises UserError: not available.
    """
    import huggingface_hub

    if Path(source).is_dir():
        return Path(source)
    offline_if_unreachable()
    try:
        found = huggingface_hub.snapshot_download(
            str(source), revision=revision, allow_patterns=list(patterns)
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"'{source}': no such folder, and not to be had from Hugging Face ({reason})"
        ) from None
    return Path(found)


def file(name: str, path: str, subfolder: str | None = None) -> Path:
    """The local path of one file of a repository. Raises OSError, ValueError: not available."""
    import huggingface_hub

    offline_if_unreachable()
    return Path(huggingface_hub.hf_hub_download(name, path, subfolder=subfolder))


def _check_folder(folder: Path) -> None:
    """Raises OSError: a pipe or device, or JSON beyond the limit; UserError: sizes in the config that no model has."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            limits.check_regular(path, limits.DOCUMENT_BYTES if path.suffix == ".json" else None)
    tree: Any = None
    with contextlib.suppress(UserError, FileNotFoundError):  # transformers reports a bad file
        tree = limits.read_json(folder / "config.json", "a config")
    if isinstance(tree, dict):
        check_sizes(tree, str(folder / "config.json"))


def _in_a_sentence(read: Callable[[], T]) -> T:
    """Returns `read()`. A library fails on strange files with many types of errors; they become ValueErrors here."""
    try:
        return read()
    except (OSError, ValueError):
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # the panic of a library written in Rust
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


@lru_cache
def offline_if_unreachable() -> None:
    """Tells huggingface_hub to work offline from now on, if the hub's name does not resolve here.

    Otherwise huggingface_hub asks six times for every file that is not in its cache, 31 s in all. Cached files are
    found either way. Behind a proxy nothing changes, because the proxy resolves names.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or getproxies():
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # for processes started from here
