"""A judge behind an OpenAI-compatible endpoint: vLLM, a gateway, or a vendor.

The key is read from an environment variable when a question is asked. It goes into one header, and into no log, record
or message. The weights behind an endpoint cannot be known; the scores say so.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from typing import Any

import httpx
from PIL import Image
from torch import Tensor

from base import files
from base.config import UserError
from base.redaction import redact
from data.samples.captions import mended
from evaluation.config import KEY_VARIABLE
from evaluation.judges.interface import EDITSCORE, Decoding, metric_name
from evaluation.store import RefusedError

TRIES = 6
TIMEOUT_S = 300
MAX_WAIT_S = 600.0  # limit on the wait that a server asks for in Retry-After
MAX_ANSWER_BYTES = 8 << 20
PASSING = (408, 409, 429, 500, 502, 503, 504)  # statuses of errors that may pass: ask again
OF_ONE_ITEM = (400, 413, 415, 422)  # statuses of a content filter, or of a limit on one request
FIRST_REFUSALS = 5
"""This many refusals before any answer mean that the address, model or key is wrong, not the items."""


class EndpointJudge:
    """An HTTP client as evaluation.judges.interface.VisionLanguageJudge."""

    def __init__(
        self,
        url: str,
        model: str,
        *,
        name: str | None = None,
        decoding: Decoding = EDITSCORE,
        key_variable: str = KEY_VARIABLE,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`url`: up to and with /v1. Raises UserError: no http address."""
        if not url.startswith(("http://", "https://")):
            raise UserError(f"judge endpoint '{url}': give an http address that ends with /v1")
        self.name = name or metric_name(model)
        self._url, self._model, self._decoding = url.rstrip("/"), model, decoding
        self._key_variable, self._sleep = key_variable, sleep
        self.protocol: Mapping[str, Any] = {
            "judge": model,
            "decoding": vars(decoding),
            "weights": "behind an endpoint: they cannot be known and may change",
        }
        self.fingerprint = files.digest(["endpoint", model, vars(decoding)])
        self._client = _client()
        self._num_refused: int | None = 0  # None once a question was answered

    def __call__(self, images: Sequence[Tensor], text: str, seed: int, text_first: bool = False) -> str:
        """uint8 [3, H, W] each. Raises RefusedError: this question is refused; UserError: every try failed."""
        pictures = [{"type": "image_url", "image_url": {"url": _data_url(image)}} for image in images]
        words = [{"type": "text", "text": text}]
        body = {
            "model": self._model,
            "messages": [
                {"role": "user", "content": [*words, *pictures] if text_first else [*pictures, *words]}
            ],
            "temperature": self._decoding.temperature,
            "top_p": self._decoding.top_p,
            "max_tokens": self._decoding.max_new_tokens,
            "seed": seed,
        }
        reply = self._post(json.dumps(body).encode())
        try:
            said = str(reply["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError, RecursionError):
            raise UserError(
                f"{redact(self._url)}: its answer has no choices[0].message.content; is it /v1?"
            ) from None
        self._num_refused = None
        return mended(said).strip()

    def _post(self, payload: bytes) -> Any:
        """The parsed answer. Errors that may pass are tried again, after the wait that the server asks for, if any."""
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        key = os.environ.get(self._key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        reason, wait_s = "", 0.0
        for attempt in range(TRIES):
            if attempt:
                self._sleep(wait_s or float(2**attempt))
            try:
                status, wait_s, content = self._send(payload, headers)
                if status == 200:
                    return json.loads(content)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError, RecursionError) as error:
                # No connection; half an answer; an answer that is no JSON.
                is_deep = isinstance(error, RecursionError)
                reason, wait_s = "JSON nested too deep" if is_deep else type(error).__name__, 0.0
                continue
            reason = f"status {status}"
            if status in OF_ONE_ITEM:
                self._refuse(f"{reason}: {_said(content)}", content)
            if status not in PASSING:
                break
        raise UserError(
            f"{redact(self._url)}: no answer ({reason}); look at the address, the model '{self._model}' and the key in "
            f"{self._key_variable}, then run again to go on"
        )

    def _send(self, payload: bytes, headers: Mapping[str, str]) -> tuple[int, float, bytes]:
        """Returns status, seconds that the server asks to wait (0: none) and body.

        Raises ValueError: too long a body; TimeoutError: the whole reply takes too long, as httpx limits each read
        only.
        """
        pool = futures.ThreadPoolExecutor(1)
        try:
            return pool.submit(self._stream, payload, headers).result(TIMEOUT_S)
        except TimeoutError:
            self._client.close()  # ends the thread with its connection
            self._client = _client()
            raise
        finally:
            pool.shutdown(wait=False)

    def _stream(self, payload: bytes, headers: Mapping[str, str]) -> tuple[int, float, bytes]:
        content = bytearray()
        with self._client.stream(
            "POST", f"{self._url}/chat/completions", content=payload, headers=headers
        ) as reply:
            for chunk in reply.iter_raw():  # not unpacked: 64 KiB could unpack to much more
                content += chunk
                if len(content) > MAX_ANSWER_BYTES:
                    raise ValueError("an answer without an end")
            asked = reply.headers.get("Retry-After", "")
            wait_s = min(float(asked), MAX_WAIT_S) if asked.isdecimal() else 0.0
            return reply.status_code, wait_s, bytes(content)

    def _refuse(self, reason: str, content: bytes) -> None:
        """Raises RefusedError for one question, UserError if the endpoint would refuse every question."""
        if self._num_refused is not None:
            self._num_refused += 1
            if _is_about_the_model(content) or self._num_refused == FIRST_REFUSALS:
                raise UserError(
                    f"{redact(self._url)}: refuses every question ({reason}); look at the model '{self._model}' and "
                    "at what it takes, then run again to go on"
                )
        raise RefusedError(reason)


def _client() -> httpx.Client:
    return httpx.Client(timeout=TIMEOUT_S, follow_redirects=False)  # the key is for this address alone


def _said(content: bytes) -> str:
    """The text of a refusal, short and printable."""
    text = content.decode("utf-8", "replace")
    try:
        error = json.loads(text)["error"]
        text = " ".join(str(error[name]) for name in ("code", "message") if error.get(name) is not None)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    return redact("".join(c if c.isprintable() else " " for c in text)[:200].strip()) or "without a reason"


def _is_about_the_model(content: bytes) -> bool:
    try:
        error = json.loads(content)["error"]
        return "model" in f"{error.get('code')} {error.get('param')}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def _data_url(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
