"""The judge behind an endpoint, against a server of this machine."""

import base64
import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from engine.config import ConfigError, UserError
from evaluation.judges.endpoint import EndpointJudge
from evaluation.judges.interface import Decoding, metric_name

SECRET = "a-key-that-nobody-may-see"


class Server(HTTPServer):
    """Replies with the given statuses in turn, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.reply: Any = {"choices": [{"message": {"content": " fine "}}]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(self.server.reply).encode())

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def judge(server: Server, waits: list[float]) -> EndpointJudge:
    return EndpointJudge(f"http://127.0.0.1:{server.server_port}/v1/", "Org/Model-8B", sleep=waits.append)


PIXELS = torch.arange(3 * 4 * 5, dtype=torch.uint8).reshape(3, 4, 5)


def test_images_words_seed_and_key_arrive(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    asked = judge(server, [])
    assert asked([PIXELS, PIXELS], "what?", seed=44, text_first=True) == "fine"
    ((path, headers, body),) = server.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {SECRET}"
    assert (body["model"], body["seed"], body["temperature"]) == ("Org/Model-8B", 44, 0.7)
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["text", "image_url", "image_url"]
    payload = body["messages"][0]["content"][1]["image_url"]["url"].partition(",")[2]
    picture = np.array(Image.open(io.BytesIO(base64.b64decode(payload))))
    assert np.array_equal(picture, PIXELS.permute(1, 2, 0).numpy())
    assert SECRET not in json.dumps(dict(asked.protocol)) and asked.name == "model_8b"


def test_busy_servers_are_asked_again_and_refusals_are_not(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    waits: list[float] = []
    server.statuses = [429, 503]
    assert judge(server, waits)([PIXELS], "what?", 0) == "fine" and waits == [2.0, 4.0]
    server.statuses = [401]
    with pytest.raises(UserError, match=r"status 401.*key in OPENAI_API_KEY") as error:
        judge(server, waits)([PIXELS], "what?", 0)
    assert SECRET not in str(error.value) and len(server.requests) == 4
    server.statuses = [500] * 6
    with pytest.raises(UserError, match="status 500"):
        judge(server, waits)([PIXELS], "what?", 0)
    assert len(waits) == 2 + 5


def test_other_replies_are_one_clear_line(server: Server) -> None:
    server.reply = {"error": "no such model"}
    with pytest.raises(UserError, match="is it /v1"):
        judge(server, [])([PIXELS], "what?", 0)
    with pytest.raises(UserError, match="give an http address"):
        EndpointJudge("file:///etc/passwd", "m")


def test_names_and_decoding() -> None:
    assert metric_name("Qwen/Qwen3-VL-8B-Instruct") == "qwen3_vl_8b_instruct"
    assert metric_name("models/my judge/") == "my_judge"
    with pytest.raises(ConfigError, match="temperature >= 0"):
        Decoding(temperature=-1)
