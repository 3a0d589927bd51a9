"""Masks possible secrets before text is written or printed: in urls, in settings and from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

MASK = "***"
MIN_SECRET_CHARACTERS = 8
"""Shorter values of the environment are not masked: ordinary words may contain them."""
FOLDERS_OF_A_SHELL = ("PWD", "OLDPWD")
"""Variables of every shell: their names look like a password's, but they hold the current and the last folder."""

_WORDS = (
    r"pass|pwd|passwd|password|passphrase|secrets?|credentials?|sas|signature|authorization|bearer|cookie"
)
_KEYS = r"(?:api|access|account|auth|client|private|secret|session|shared|sas)?_?(?:key|token|secret|pwd|password)"
_SECRET_NAME = re.compile(
    rf"(?:^|[_\-.])(?:{_WORDS}|{_KEYS}|(?:api|access|secret)_?keys|passwords|auth|connection_?string)$",
    re.IGNORECASE,
)
_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_QUOTED = r"""(?:"[^"\n]*"|'[^'\n]*')"""
_CHARACTER = r"""(?:(?!://)[^\s'"])"""
# name:password@ with any characters in the password, or one word before the @.
_USER = re.compile(rf"://(?:[^\s'\"/:@]*:{_CHARACTER}*@|[^/\s?'\"]*@)")
_QUERY = re.compile(
    rf"(://[^\s'\"?#]*)(?:\?|\#(?=[^\s'\"]*=))(?:={_QUOTED}|[^\s'\"])*?(?=[:;,.)]*(?:[\s'\"]|$)(?<!=))"
)
_BEARER = re.compile(r"\b(authorization:\s*(?:\w+\s+)?|bearer\s+(?=\S{8}))[^\s'\"]+", re.IGNORECASE)
_SETTING = re.compile(rf"(?<![\w./?&-])([\w.\-]+)=({_QUOTED}|[^\s'\",;)]+)")
_ITEM = re.compile(rf"(['\"])([\w.\-]+)\1(\s*:\s*)({_QUOTED}|-?\d[\d.e+\-]*)")


def redact(text: str) -> str:
    """`text` without user, password, query and fragment of urls, and without secrets of the environment.

    A secret of the environment is the value of a variable whose name says so: WANDB_API_KEY, HF_TOKEN, ... Settings in
    the text (`name=value`, `'name': 'value'`) are masked by their names, too.
    """
    for name, value in os.environ.items():
        if len(value) >= MIN_SECRET_CHARACTERS and is_secret(name) and name not in FOLDERS_OF_A_SHELL:
            text = text.replace(value, MASK)
    if "://" in text:
        text = _QUERY.sub(r"\1", _USER.sub("://", text))
    text = _BEARER.sub(rf"\1{MASK}", text)
    text = _SETTING.sub(lambda found: f"{found[1]}={MASK}" if is_secret(found[1]) else found[0], text)
    return _ITEM.sub(
        lambda found: (
            f"{found[1]}{found[2]}{found[1]}{found[3]}'{MASK}'" if is_secret(found[2]) else found[0]
        ),
        text,
    )


def redacted(value: Any) -> Any:
    """A copy of nested mappings and lists with every text redacted, and masked whole if its key names a secret."""
    if isinstance(value, Mapping):
        return {
            redact(str(name)): _masked(item) if is_secret(str(name)) else redacted(item)
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [redacted(item) for item in value]
    return redact(value) if isinstance(value, str) else value


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `password`, `HF_TOKEN`, `apiKey`; not `text_tokenizer`."""
    return _SECRET_NAME.search(_HUMP.sub("_", name)) is not None


def _masked(value: Any) -> Any:
    """A copy with every text and number masked; booleans, None and '' are no secrets."""
    if isinstance(value, Mapping):
        return {redact(str(name)): _masked(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_masked(item) for item in value]
    return value if value is None or value == "" or isinstance(value, bool) else MASK
