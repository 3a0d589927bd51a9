"""Nothing waits for a hub that cannot be reached."""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from engine import hub

ROOT = Path(__file__).parents[2]
DOWNLOADS = {"from_pretrained", "hf_hub_download", "snapshot_download", "create_model"}


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.offline_if_unreachable.cache_clear()
    yield
    hub.offline_if_unreachable.cache_clear()


def no_names(*_: Any) -> None:
    raise socket.gaierror("Name or service not known")


def test_a_name_that_does_not_resolve_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    hub.offline_if_unreachable()
    assert constants.HF_HUB_OFFLINE


def test_a_name_that_resolves_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: [])
    hub.offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def test_behind_a_proxy_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    hub.offline_if_unreachable()
    assert not constants.HF_HUB_OFFLINE


def test_every_function_that_may_download_asks_first() -> None:
    """Found in the sources: calls of the libraries' downloads, and the function around each of them."""
    met = []
    for package in ("data", "tokenizer", "generator", "evaluation", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            for function in ast.walk(ast.parse(path.read_text())):
                if not isinstance(function, ast.FunctionDef):
                    continue
                calls = {ast.unparse(node.func) for node in ast.walk(function) if isinstance(node, ast.Call)}
                if {call.rpartition(".")[2] for call in calls} & DOWNLOADS:
                    met.append(f"{path.name}:{function.name}")
                    assert "hub.offline_if_unreachable" in calls, met[-1]
    assert len(met) >= 10
