"""Text tokenizers of tests: no file, and an id for each letter or byte."""

from __future__ import annotations

from collections.abc import Sequence


class Letters:
    """One id for each letter a to z, then the special tokens; fits models with a vocabulary of 32."""

    vocab_size = 32
    im_start_id, im_end_id, vision_start_id, vision_end_id = 26, 27, 28, 29
    fingerprint = "text"

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text if letter.isalpha()]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(ord("a") + id_) for id_ in ids)


class Bytes:
    """One id for each byte of UTF-8, then the special tokens; keeps every text."""

    vocab_size = 300
    im_start_id, im_end_id, vision_start_id, vision_end_id = 256, 257, 258, 259
    fingerprint = "letters"

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode()
