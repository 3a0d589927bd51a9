"""The judge behind an endpoint, against a server of this machine."""

import base64
import contextlib
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

from base.config import ConfigError, UserError
from evaluation.judges.endpoint import EndpointJudge
from evaluation.judges.interface import Decoding, metric_name
from evaluation.store import Question, RecordStore, RefusedError

SECRET = "a-key-that-nobody-may-see"


class Server(HTTPServer):
    """Replies with the given statuses in turn, then with 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.statuses: list[int] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.reply: Any = {"choices": [{"message": {"content": " fine "}}]}
        self.headers: dict[str, str] = {}
        self.body: bytes | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.path, dict(self.headers), json.loads(body)))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        for name, value in self.server.headers.items():
            self.send_header(name, value)
        self.end_headers()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.wfile.write(self.server.body or json.dumps(self.server.reply).encode())

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


def filtered(message: str = "the provider's policy\x1b[31m", code: str = "content_filter") -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def test_a_refused_question_is_told_with_the_servers_reason_and_the_next_is_asked(server: Server) -> None:
    asked = judge(server, [])
    assert asked([PIXELS], "what?", 0) == "fine"
    server.statuses, answer, server.reply = [400], server.reply, filtered()
    with pytest.raises(RefusedError, match=r"^status 400: content_filter the provider's policy") as error:
        asked([PIXELS], "what?", 0)
    assert str(error.value).isprintable()
    server.reply = answer
    assert asked([PIXELS], "what?", 0) == "fine"


@pytest.mark.parametrize(
    ("reply", "num_refused"),
    [
        (filtered("no such model: Org/Model-8B", "model_not_found"), 0),
        (filtered("unsupported parameter: top_p", "unsupported_parameter"), 4),
    ],
)
def test_a_server_that_refuses_everything_ends_the_evaluation(
    server: Server, reply: Any, num_refused: int
) -> None:
    asked = judge(server, [])
    server.reply, server.statuses = reply, [400] * 99
    for _ in range(num_refused):
        with pytest.raises(RefusedError):
            asked([PIXELS], "what?", 0)
    with pytest.raises(UserError, match="refuses every question") as error:
        asked([PIXELS], "what?", 0)
    assert not isinstance(error.value, RefusedError) and len(server.requests) == num_refused + 1


def test_the_server_says_how_long_to_wait(server: Server) -> None:
    waits: list[float] = []
    server.statuses, server.headers = [429, 503], {"Retry-After": "7"}
    assert judge(server, waits)([PIXELS], "what?", 0) == "fine" and waits == [7.0, 7.0]
    server.statuses, server.headers = [429], {"Retry-After": "99999999"}
    assert judge(server, waits)([PIXELS], "what?", 0) == "fine" and waits[2:] == [600.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(
    server: Server, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    server.statuses = [status]
    server.headers = {"Location": f"http://localhost:{server.server_port}/v1/chat/completions"}
    with pytest.raises(UserError, match=f"no answer \\(status {status}\\)"):
        judge(server, [])([PIXELS], "what?", 0)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "body",
    [b"[" * 200_000, b'{"choices": [{"message"', b"{}" + b" " * (9 << 20), b"\xff\xfe"],
    ids=["deep", "cut", "without an end", "no text"],
)
def test_a_strange_body_is_one_line(server: Server, body: bytes) -> None:
    server.body = body
    waits: list[float] = []
    with pytest.raises(UserError, match="no answer") as error:
        judge(server, waits)([PIXELS], "what?", 0)
    assert "\n" not in str(error.value) and len(waits) == 5


def test_half_a_character_in_an_answer_can_be_written_down(server: Server) -> None:
    server.body = b'{"choices": [{"message": {"content": "a \\ud800 b"}}]}'
    judge(server, [])([PIXELS], "what?", 0).encode()


def test_a_refusal_is_kept_told_and_asked_again(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    refuses = True

    def ask() -> str:
        if refuses:
            raise RefusedError("status 400: content_filter")
        return "fine"

    questions = [Question("a/sc", 0, "c", lambda: "good"), Question("b/sc", 0, "c", ask)]
    RecordStore(tmp_path).answer(questions, "judging")
    told = capsys.readouterr().out
    assert "1 of 2 questions were refused: 'b/sc' (status 400: content_filter)" in told
    assert RecordStore(tmp_path).find("b/sc", 0, "c").reason == "status 400: content_filter"
    refuses = False
    store = RecordStore(tmp_path)
    store.answer(questions, "judging")
    assert store.find("b/sc", 0, "c") == RecordStore(tmp_path).find("b/sc", 0, "c") == "fine"
