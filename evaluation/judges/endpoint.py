"""A judge behind an OpenAI-compatible endpoint: vLLM, a gateway, or a vendor.

The key is read from an environment variable when a question is asked, goes into one header, and is in no log, record
or message. What weights stand behind an endpoint cannot be known; the scores say so.
"""

from __future__ import annotations

import base64
import io
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from engine import files
from engine.config import UserError
from evaluation.judges.interface import EDITSCORE, Decoding, metric_name

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 6
TIMEOUT_S = 300
PASSING = (408, 409, 429, 500, 502, 503, 504)  # statuses that may be other the next time


class EndpointJudge:
    """Implements evaluation.judges.interface.VisionLanguageJudge."""

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

    def __call__(self, images: Sequence[Tensor], text: str, seed: int, text_first: bool = False) -> str:
        """uint8 [3, H, W] each. Raises UserError: refused, or no answer after several tries."""
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
            return str(reply["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError):
            raise UserError(
                f"{self._url}: its answer has no choices[0].message.content; is it /v1?"
            ) from None

    def _post(self, payload: bytes) -> Any:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self._key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        reason = ""
        for attempt in range(TRIES):
            if attempt:
                self._sleep(float(2**attempt))
            request = urllib.request.Request(f"{self._url}/chat/completions", payload, headers)
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
                    return json.loads(reply.read())
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in PASSING:
                    break
            except (OSError, ValueError) as error:  # no connection; half an answer
                reason = type(error).__name__
        raise UserError(
            f"{self._url}: no answer ({reason}); look at the address, the model '{self._model}' and the key in "
            f"{self._key_variable}, then run again to go on"
        )


def _data_url(image: Tensor) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
