"""Models, processors, configs and tokenizers of others, from a folder or the Hugging Face hub: the only way to them.

No code that comes with them is run, and nobody is asked whether it may. Whether the hub can be reached at all is asked
once, so that nothing waits for it in vain.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Sequence
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
    """`cls.from_pretrained(source, **arguments)` for a class of transformers; `source`: a folder, a name of the hub.

    Raises OSError: cannot be had. Raises ValueError: files that transformers cannot read, or that need code of theirs.
    """
    offline_if_unreachable()
    if Path(source).is_dir():
        _check_folder(Path(source))
    return _in_a_sentence(lambda: cls.from_pretrained(source, trust_remote_code=False, **arguments))


def from_config(cls: Any, config: Any, **arguments: Any) -> Any:
    """A model without weights, by an Auto class of transformers. Raises ValueError: it needs code of theirs."""
    check_sizes(config.to_dict(), type(config).__name__)
    return cls.from_config(config, trust_remote_code=False, **arguments)


def create_timm(name: str, *, pretrained: bool, **arguments: Any) -> Any:
    """`timm.create_model`. Raises what it raises."""
    import timm  # takes a second to import: only where it is needed

    if pretrained:
        offline_if_unreachable()
    return timm.create_model(name, pretrained=pretrained, **arguments)


def snapshot(name: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """A folder with the files of a repository whose names fit `patterns`. Raises OSError, ValueError: cannot be had."""
    import huggingface_hub

    offline_if_unreachable()
    return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def file(name: str, path: str, subfolder: str | None = None) -> Path:
    """One file of a repository. Raises OSError, ValueError: cannot be had."""
    import huggingface_hub

    offline_if_unreachable()
    return Path(huggingface_hub.hf_hub_download(name, path, subfolder=subfolder))


def _check_folder(folder: Path) -> None:
    """Raises OSError: a pipe or device, JSON beyond the limit; UserError: a config with sizes that no model has."""
    for path in sorted(folder.iterdir()):
        if not path.is_dir():
            limits.check_regular(path, limits.DOCUMENT_BYTES if path.suffix == ".json" else None)
    tree: Any = None
    with contextlib.suppress(UserError, FileNotFoundError):  # transformers says what is wrong with it
        tree = limits.read_json(folder / "config.json", "a config")
    if isinstance(tree, dict):
        check_sizes(tree, str(folder / "config.json"))


def _in_a_sentence(read: Callable[[], T]) -> T:
    """What `read` gives. A library's many readers fail on strange files in as many ways: all become ValueErrors."""
    try:
        return read()
    except (OSError, ValueError):
        raise
    except BaseException as error:
        if (
            not isinstance(error, Exception) and type(error).__name__ != "PanicException"
        ):  # of a library in Rust
            raise
        raise ValueError(f"{type(error).__name__}: {error}") from error


@lru_cache
def offline_if_unreachable() -> None:
    """Tells huggingface_hub to work offline from now on, if the hub's name does not resolve here.

    Without this every file of a model that is not in the cache is asked for six times, 31 s in all. Files in the cache
    are found either way. Behind a proxy nothing changes: there the proxy resolves names.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or host is None or getproxies():
        return
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"  # of processes started from here
