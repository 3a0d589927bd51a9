"""The Hugging Face hub: whether it can be reached at all, asked once, so that nothing waits for it in vain."""

from __future__ import annotations

import os
import socket
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies


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
