"""Mutations that know the format: what comes out is nearly a file of its kind, so that it reaches far into a reader."""

from __future__ import annotations

import csv
import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

Rng = np.random.Generator
STRANGE: tuple[Any, ...] = (
    0, 1, -1, 3, 2**31, 2**63, -(10**30), 10**12, 0.5, 1e308, 1e-60, float("inf"), float("nan"), None, True, False,
    "", "x", "0", "nan", "../../x", "/dev/zero", "a\x00b", "\ud83d", "\u202e", "é" * 300, "1e999", "\xff",
    [], {}, [[]], [0], {"": 0}, {"a": {"a": {"a": []}}},
)  # fmt: skip
WORDS = (0, 1, 2**7, 2**15, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1)
BLOCK = 512  # of a tar


def pick(rng: Rng, values: Any) -> Any:
    return values[int(rng.integers(len(values)))]


def mutate(rng: Rng, path: Path) -> str:
    """Changes the file in place, one to three times; what was done."""
    done = []
    for _ in range(int(rng.integers(1, 4))):
        payload = path.read_bytes()
        of_kind = next((change for ending, change in BY_ENDING.items() if path.name.endswith(ending)), None)
        change = of_kind if of_kind and rng.random() < 0.8 else noise
        try:
            changed = change(rng, payload)
        except Exception:  # an earlier change has left nothing of the format
            change, changed = noise, noise(rng, payload)
        path.write_bytes(changed)
        done.append(change.__name__)
    return f"{path.name}: {', '.join(done)}"


def noise(rng: Rng, payload: bytes) -> bytes:
    """Bytes flipped, taken out, put in, repeated, or the end cut off."""
    at = int(rng.integers(len(payload) + 1))
    length = int(pick(rng, (1, 2, 8, 64, 1000)))
    kind = int(rng.integers(6))
    if kind == 0 and payload:
        changed = bytearray(payload)
        for _ in range(int(rng.integers(1, 9))):
            changed[int(rng.integers(len(payload)))] ^= 1 << int(rng.integers(8))
        return bytes(changed)
    if kind == 1:
        return payload[:at]
    if kind == 2:
        return payload[:at] + payload[at + length :]
    if kind == 3:
        return payload[:at] + rng.bytes(length) + payload[at:]
    if kind == 4:
        return payload[:at] + payload[at : at + length] * 3 + payload[at + length :]
    word = int(pick(rng, WORDS)).to_bytes(8, "little")[: int(pick(rng, (1, 2, 4, 8)))]
    return payload[:at] + word + payload[at + len(word) :]


# --- trees


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every node of a tree stands."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path, *(place for key, value in inside for place in places(value, (*path, key)))]


def change_tree(rng: Rng, tree: Any) -> Any:
    """One node replaced, taken out, renamed, wrapped, repeated or exchanged for another one."""
    where = pick(rng, places(tree)[1:] or [()])
    if not where:
        return pick(rng, STRANGE)
    owner = tree
    for key in where[:-1]:
        owner = owner[key]
    key, value = where[-1], owner[where[-1]]
    kind = int(rng.integers(9))
    if kind <= 2:
        owner[key] = pick(rng, STRANGE)
    elif kind == 3:
        owner[key] = near(rng, value)
    elif kind == 4:
        del owner[key]
    elif kind == 5:
        owner[key] = [value] if rng.random() < 0.5 else {"a": value}
    elif kind == 6 and isinstance(owner, dict):
        owner[f"{key}{pick(rng, ('x', ' ', '.', chr(0x202E)))}"] = owner.pop(key)
    elif kind == 7:
        owner[key] = _at(tree, pick(rng, places(tree)))
        owner[key] = json.loads(json.dumps(owner[key])) if owner[key] is not tree else None
    elif isinstance(owner, list):
        owner.extend([value] * int(pick(rng, (1, 9, 500))))
    else:
        nested: Any = value
        for _ in range(int(pick(rng, (3, 60, 400)))):
            nested = [nested]
        owner[key] = nested
    return tree


def near(rng: Rng, value: Any) -> Any:
    """Another value of its type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick(rng, (value + 1, value - 1, -value, value * 2, value * 10**6, float(value), str(value)))
    if isinstance(value, float):
        return pick(
            rng, (-value, value * 1e30, value / 1e30, int(value) if abs(value) < 1e300 else 0, str(value))
        )
    if isinstance(value, str):
        return pick(
            rng, (value + value, value[:-1], value.upper(), f"../{value}", value + "\x1b[2J", value * 50)
        )
    return type(value)()


def _at(tree: Any, where: tuple[Any, ...]) -> Any:
    for key in where:
        tree = tree[key]
    return tree


def change_json(rng: Rng, payload: bytes) -> bytes:
    tree = change_tree(rng, json.loads(payload))
    text = json.dumps(tree)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:  # a key that stands twice
        text = '{"' + next(iter(tree)) + '": 0, ' + text[1:]
    return _as_text(rng, text)


def _as_text(rng: Rng, text: str) -> bytes:
    chance = rng.random()
    if chance < 0.03:
        return b"\xef\xbb\xbf" + text.encode()
    return text.encode("utf-16") if chance < 0.05 else text.encode("utf-8", "surrogatepass")


def change_jsonl(rng: Rng, payload: bytes) -> bytes:
    lines = payload.splitlines() or [b"{}"]
    at = int(rng.integers(len(lines)))
    lines[at] = change_json(rng, lines[at])
    if rng.random() < 0.2:
        lines.insert(at, pick(rng, lines))
    return pick(rng, (b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join([*lines, b""])


def change_yaml(rng: Rng, payload: bytes) -> bytes:
    return _as_text(rng, yaml.safe_dump(change_tree(rng, yaml.safe_load(payload))))


def change_csv(rng: Rng, payload: bytes) -> bytes:
    rows = list(csv.reader(io.StringIO(payload.decode(), newline="")))
    row = pick(rng, rows)
    kind = int(rng.integers(4))
    if kind == 0:
        row[int(rng.integers(len(row)))] = str(pick(rng, STRANGE))
    elif kind == 1:
        row.pop(int(rng.integers(len(row))))
    elif kind == 2:
        row.insert(int(rng.integers(len(row) + 1)), str(pick(rng, ("x" * 200_000, "", '"', ",,\n"))))
    else:
        rows.append(row)
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    return out.getvalue().encode("utf-8", "surrogatepass")


# --- containers


def change_safetensors(rng: Rng, payload: bytes) -> bytes:
    length = int.from_bytes(payload[:8], "little")
    header, rest = json.loads(payload[8 : 8 + length]), payload[8 + length :]
    kind = int(rng.integers(6))
    name = pick(rng, [name for name in header if name != "__metadata__"])
    if kind == 0:
        return int(pick(rng, WORDS)).to_bytes(8, "little") + payload[8:]
    if kind == 1:
        header[name]["dtype"] = pick(rng, ("F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E4M3", "C64", "X"))
    elif kind == 2:
        shape = header[name]["shape"]
        header[name]["shape"] = pick(rng, (shape[::-1], [], [0], [1, *shape], [2**40, 2**40], [-1]))
    elif kind == 3:
        header[f"{name}{pick(rng, ('x', '.', '/', ':'))}"] = header.pop(name)
    elif kind == 4:
        header = change_tree(rng, header)
    else:
        del header[name]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + rest


def change_values(rng: Rng, payload: bytes) -> bytes:
    """Values of a safetensors file that are no numbers, the header as it was."""
    begin = 8 + int.from_bytes(payload[:8], "little")
    at = begin + 4 * int(rng.integers(max((len(payload) - begin) // 4, 1)))
    return (
        payload[:at]
        + struct.pack("<f", pick(rng, (float("nan"), float("inf"), 1e38, 0.0)))
        + payload[at + 4 :]
    )


def change_tar(rng: Rng, payload: bytes) -> bytes:
    """A field of a header, its checksum put right; or members out, in, or in another order."""
    starts = [at for at in range(0, len(payload), BLOCK) if payload[at + 257 : at + 262] == b"ustar"]
    at = int(pick(rng, starts))
    block = bytearray(payload[at : at + BLOCK])
    kind = int(rng.integers(8))
    if kind == 0:
        sizes = (
            b"77777777777\0",
            b"00000000000\0",
            b"\x80" + b"\xff" * 11,
            b"-0000000001\0",
            b"            ",
            b"00000000011\0",
        )
        block[124:136] = pick(rng, sizes)
    elif kind == 1:
        names = (
            b"../../x.png",
            b"/etc/x.png",
            b"a\x1b[2J.png",
            b"\xff\xfe.png",
            b"",
            b"a",
            b".png",
            b"a.b.c.png",
            b"x" * 100,
        )
        block[0:100] = pick(rng, names).ljust(100, b"\0")
    elif kind == 2:
        block[156:157] = pick(
            rng, (b"1", b"2", b"3", b"5", b"6", b"L", b"K", b"x", b"g", b"S", b"\0", b"\xff")
        )
    elif kind == 3:
        place = int(rng.integers(BLOCK))
        block[place] ^= 1 << int(rng.integers(8))
    elif kind == 4:  # a PAX header in front: its size or name counts
        key, value = pick(
            rng,
            (
                ("size", "99999999999"),
                ("size", "-1"),
                ("size", "x"),
                ("path", "../y.png"),
                ("path", "\x00"),
                ("", ""),
            ),
        )
        return payload[:at] + _pax(rng, key, value) + payload[at:]
    elif kind == 5:
        return payload[:at] + payload[int(pick(rng, starts)) :]
    elif kind == 6:
        return payload[:at] + bytes(BLOCK * int(pick(rng, (1, 2, 3)))) + payload[at:]
    else:
        other = int(pick(rng, starts))
        return payload[: max(at, other)] + payload[min(at, other) :]
    if rng.random() < 0.9:
        block[148:156] = b"        "
        block[148:156] = b"%06o\0 " % sum(block)
    return payload[:at] + bytes(block) + payload[at + BLOCK :]


def _pax(rng: Rng, key: str, value: str) -> bytes:
    record = f" {key}={value}\n".encode()
    length = len(record) + 2
    body = f"{pick(rng, (length, length, length + 5, 10**9))}".encode() + record
    header = bytearray(BLOCK)
    header[0:5], header[100:108], header[124:136] = b"PaxHd", b"0000644\0", b"%011o\0" % len(body)
    header[156:157], header[257:265], header[148:156] = b"x", b"ustar\x0000", b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + body.ljust(-(-len(body) // BLOCK) * BLOCK, b"\0")


def change_parquet(rng: Rng, payload: bytes) -> bytes:
    """A column of another type, with nulls, twice, under another name, away; no rows; other row groups."""
    table = pq.read_table(io.BytesIO(payload))
    at = int(rng.integers(table.num_columns))
    name, column = table.column_names[at], table.column(at).to_pylist()
    kind = int(rng.integers(7))
    if kind <= 1:
        types = (pa.string(), pa.binary(), pa.int64(), pa.float64(), pa.bool_(), pa.null(), pa.list_(pa.string()),
                 pa.timestamp("ns"), pa.decimal128(38, 3), pa.dictionary(pa.int32(), pa.string()),
                 pa.struct([("bytes", pa.string()), ("path", pa.int8())]), pa.list_(pa.binary()), pa.large_string(),
                 pa.map_(pa.string(), pa.int64()), pa.duration("us"), pa.float16())  # fmt: skip
        chosen = pick(rng, types)
        values = pa.nulls(len(column), chosen)
        if rng.random() < 0.7:
            sample = {
                pa.string(): "é", pa.binary(): b"\xff", pa.int64(): 2**62, pa.float64(): float("nan"),
                pa.bool_(): True, pa.list_(pa.string()): ["", "x"], pa.timestamp("ns"): 2**62,
                pa.list_(pa.binary()): [b""],
            }  # fmt: skip
            if chosen in sample:
                values = pa.array([sample[chosen]] * len(column), chosen)
        table = table.set_column(at, name, values)
    elif kind == 2:
        column[int(rng.integers(len(column)))] = None
        table = table.set_column(at, name, pa.array(column, table.schema.field(at).type))
    elif kind == 3:
        table = table.append_column(name, table.column(at))
    elif kind == 4:
        table = table.rename_columns([f"{n}\x1b" if n == name else n for n in table.column_names])
    elif kind == 5:
        table = table.remove_column(at)
    else:
        table = table.slice(0, int(pick(rng, (0, 1))))
    out = io.BytesIO()
    pq.write_table(table, out, row_group_size=int(pick(rng, (1, 2, 100))))
    return out.getvalue()


def change_zip(rng: Rng, payload: bytes) -> bytes:
    """A member changed as its kind, out, renamed or twice."""
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = pick(rng, list(members))
    kind = int(rng.integers(4))
    if kind <= 1:
        members[name] = change_npy(rng, members[name]) if name.endswith(".npy") else noise(rng, members[name])
    elif kind == 2:
        del members[name]
    else:
        members[pick(rng, (f"../{name}", f"x{name}", "mu.npy", "arr_0.npy"))] = members.pop(name)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return out.getvalue()


def change_npy(rng: Rng, payload: bytes) -> bytes:
    """Type or shape of the header; or values."""
    if rng.random() < 0.4:
        begin = 10 + int.from_bytes(payload[8:10], "little")
        return payload[:begin] + noise(rng, payload[begin:])
    array = np.load(io.BytesIO(payload), allow_pickle=False)
    out = io.BytesIO()
    kinds = ("<f8", "<f4", "<i8", "|u1", "<c16", "|O", "<U4", "|V8", "<M8[s]")
    shapes = (array.shape[::-1], (), (0,), (1, *array.shape), (2**40,), (-1,), (10**9, 10**9))
    header = {
        "descr": np.lib.format.dtype_to_descr(array.dtype),
        "fortran_order": bool(rng.random() < 0.2),
        "shape": array.shape,
    }
    header |= {"descr": pick(rng, kinds)} if rng.random() < 0.5 else {"shape": pick(rng, shapes)}
    np.lib.format.write_array_header_1_0(out, header)
    return out.getvalue() + array.tobytes()


def change_gzip(rng: Rng, payload: bytes) -> bytes:
    return gzip.compress(change_jsonl(rng, gzip.decompress(payload)))


def change_http(rng: Rng, payload: bytes) -> bytes:
    """A server's answer: its status line, a header, or its JSON."""
    head, _, body = payload.partition(b"\r\n\r\n")
    status, *headers = head.split(b"\r\n")
    kind = int(rng.integers(4))
    if kind == 0:
        statuses = (
            b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/",
            b"HTTP/1.1 200",
            b"HTTP/9 200 OK",
            b"",
            b"HTTP/1.1 429 x",
        )
        status = pick(
            rng,
            (
                *statuses,
                b"HTTP/1.1 503 x",
                b"HTTP/1.1 400 x",
                b"HTTP/1.1 -7 x",
                b"HTTP/1.1 204 x",
                b"HTTP/1.1 100 x",
            ),
        )
    elif kind == 1:
        lines = (
            b"Content-Length: -1", b"Content-Length: 99999999", b"Transfer-Encoding: chunked", b"no colon",
            b"Content-Encoding: gzip", b"Retry-After: " + b"9" * 400, b"Retry-After: \xd9\xa3", b"X: " + b"x" * 200_000,
        )  # fmt: skip
        headers.append(pick(rng, lines))
    else:
        body = change_json(rng, body)
    return b"\r\n".join([status, *headers]) + b"\r\n\r\n" + body


BY_ENDING: dict[str, Callable[[Rng, bytes], bytes]] = {
    ".jsonl.gz": change_gzip,
    ".jsonl": change_jsonl,
    ".json": change_json,
    ".yaml": change_yaml,
    ".csv": change_csv,
    ".safetensors": lambda rng, payload: (change_values if rng.random() < 0.2 else change_safetensors)(
        rng, payload
    ),
    ".tar": change_tar,
    ".parquet": change_parquet,
    ".npz": change_zip,
    ".pt": change_zip,
    ".npy": change_npy,
    ".http": change_http,
}
