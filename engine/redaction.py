"""Takes out what may be secret before something is written or printed: in urls, settings, the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
MIN_SECRET_CHARACTERS = 8
"""Shorter values of the environment are not looked for: they stand in ordinary words."""

_SECRET_NAME = re.compile(
    r"(^|[_\-.])(password|passwd|passphrase|secret|token|credentials?|key|sas|signature|connection_string)$",
    re.IGNORECASE,
)
_USER = re.compile(r"://[^/\s?]*@")
_QUERY = re.compile(r"(://[^\s'\"?]*)\?[^\s'\"]*?(?=[:;,.)]*(?:[\s'\"]|$))")


def redact(text: str) -> str:
    """`text` without user, password and query (a signature) of urls, and without secrets of the environment.

    A secret of the environment is the value of a variable whose name says so: WANDB_API_KEY, HF_TOKEN, ...
    """
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_CHARACTERS and is_secret(name):
            text = text.replace(value, MASK)
    return _QUERY.sub(r"\1", _USER.sub("://", text))


def redacted(value: Any) -> Any:
    """A copy of a nest of mappings and lists: every text as in `redact`, masked whole where its name says secret."""
    if isinstance(value, Mapping):
        return {
            redact(str(name)): MASK
            if isinstance(item, str) and item and is_secret(str(name))
            else redacted(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `password`, `HF_TOKEN`, `account_key`; not `text_tokenizer`."""
    return _SECRET_NAME.search(name) is not None
