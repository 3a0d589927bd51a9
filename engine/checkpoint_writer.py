"""Writes one rank's file of a checkpoint in a thread: flat tensors cut at parameters, as safetensors, with a checksum.

A tensor's name is ENGINE/KIND/PARAMETER:START; its values are those of the flattened parameter from index START on.
KIND is `master`, the name of an optimizer state, `ema_DECAY`, or `buffer`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from isal import isal_zlib
from torch import Tensor

from base import limits
from engine.checkpoint_folder import Sum
from engine.layout import Segment

CHUNK_BYTES = 16 << 20
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Flat:
    """A 1-D tensor and the parameters' segments that lie in it; `kind` is ENGINE/KIND."""

    kind: str
    tensor: Tensor
    segments: Sequence[Segment]


def write(path: Path, flats: Sequence[Flat]) -> Sum:
    """Writes CPU tensors, without their padding, and waits for the disk. Raises OSError.

    Does not use the safetensors library: this way the checksum covers the bytes in memory, nothing is copied, and a
    full disk raises an OSError.
    """
    parts: dict[str, Tensor] = {}
    for flat in flats:
        for segment in flat.segments:
            values = flat.tensor[segment.offset : segment.offset + segment.length]
            parts[f"{flat.kind}/{segment.parameter}:{segment.start}"] = values
    names = sorted(parts, key=lambda name: (-parts[name].element_size(), name))  # large dtypes first: aligned
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        size = parts[name].numel() * parts[name].element_size()
        header[name] = {
            "dtype": DTYPES[parts[name].dtype],
            "shape": [parts[name].numel()],
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    payloads = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes(parts[name]) for name in names)]
    crc = num_bytes = 0
    try:
        with path.open("wb") as file:
            for payload in payloads:
                for begin in range(0, len(payload), CHUNK_BYTES):
                    chunk = payload[begin : begin + CHUNK_BYTES]
                    crc = isal_zlib.crc32(chunk, crc)
                    num_bytes += file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:  # the error of a failed write lacks the file's name
        raise OSError(error.errno, error.strerror, str(path)) from error
    return Sum(num_bytes, crc)


def checked(path: Path, expected: Sum) -> str:
    """What is wrong with a file ('': nothing). Reads the whole file once."""
    try:
        with limits.open_file(path) as file:
            if (num_bytes := os.fstat(file.fileno()).st_size) != expected.num_bytes:
                return f"{path.name} has {num_bytes} bytes instead of {expected.num_bytes}"
            crc = 0
            while chunk := file.read(CHUNK_BYTES):
                crc = isal_zlib.crc32(chunk, crc)
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return "" if crc == expected.crc32 else f"{path.name} has a wrong checksum"


class Staging:
    """CPU copies of tensors that change while a file is being written; the memory is allocated once and kept.

    For GPU tensors the memory is pinned, so the copy runs at the speed of the bus. The training waits for no more.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], Tensor] = {}

    def copy(self, flats: Sequence[Flat]) -> list[Flat]:
        """Copies the values to memory that no training step touches. Waits for the device."""
        copies = []
        for index, flat in enumerate(flats):
            source = flat.tensor.detach()
            key = (flat.kind, index)
            buffer = self._buffers.get(key)
            if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
                buffer = torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda)
                self._buffers[key] = buffer
            copies.append(Flat(flat.kind, buffer.copy_(source, non_blocking=True), flat.segments))
        if any(flat.tensor.is_cuda for flat in flats):
            torch.cuda.synchronize()
        return copies


class Job:
    """Runs `write` in a thread of its own."""

    def __init__(self, path: Path, flats: Sequence[Flat]) -> None:
        self._sum: Sum | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(path, flats), name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `result` returns at once."""
        return not self._thread.is_alive()

    def result(self) -> Sum:
        """Waits for the end and returns the sum. Raises what `write` raised: an OSError if the disk is full."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._sum is not None
        return self._sum

    def _run(self, path: Path, flats: Sequence[Flat]) -> None:
        try:
            self._sum = write(path, flats)
        except BaseException as error:  # `result` raises it again in the main thread
            self._error = error


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.detach().contiguous().view(torch.uint8).numpy())  # type: ignore[arg-type]
