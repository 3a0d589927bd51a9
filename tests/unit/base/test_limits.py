"""What is read has limits that stand in one place, and every reader goes by them: seen in the sources."""

from __future__ import annotations

import ast
import gzip
import io
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from base import limits, model_sizes, sources
from base.config import UserError

ROOT = Path(__file__).parents[3]
OPENERS = {
    "open", "os.open", "gzip.open", "tarfile.open", "fsspec.open", "np.load", "np.memmap", "np.fromfile", "torch.load",
    "load_file", "safetensors.safe_open", "zipfile.ZipFile", "pq.ParquetFile", "pyarrow.parquet.ParquetFile",
    "json.load", "yaml.safe_load", "sqlite3.connect", "read_table",
}  # fmt: skip
OWN = {
    "data/shards/file.py": "re-reads the shard that it wrote a moment ago",
    "data/shards/writer.py": "indices and headers that finished_shard has checked",
    "data/sources/caption_table.py": "the table and locks that make_shards wrote",
    "data/sources/deduplicate.py": "hashes that make_shards left beside its own shards",
    "quickstart/pictures/art.py": "pictures of an installed package",
    "base/terminal.py": "the null device",
    "engine/log_files.py": "logs of its own run, held by the run lock",
    "evaluation/environment.py": "/proc",
    "evaluation/features/feature_files.py": "features that the evaluation wrote, by their exact size",
    "evaluation/store.py": "the file of answers that this process adds to",
    "base/files.py": "descriptors for fsync",
    "engine/logs.py": "the run's own logs",
    "engine/memory.py": "/proc",
    "engine/run_lock.py": "the run's own lock",
    "base/threads.py": "the machine's control groups",
    "launch/runs/export_folder.py": "the run's own log",
    "tokenizer/training/perceptual.py": "the heads of an installed package; VGG16 goes by the rule",
    "launch/runs/nodes.py": "a token of this job; /proc",
}
"""Files whose reads go round the rule: each of files that nobody else makes."""


def reads(path: Path) -> Iterator[tuple[str, str, bool]]:
    """(function, call, whether the function goes by the limits) of everything in a source file that opens a file."""

    def walk(node: ast.AST, function: ast.AST) -> Iterator[tuple[str, str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call) and is_read(child):
                used = "limits." in ast.unparse(function) or "check_local(" in ast.unparse(function)
                yield getattr(function, "name", ""), ast.unparse(child), used
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, child if inside else function)

    yield from walk(ast.parse(path.read_text()), ast.Module([], []))


def is_read(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    owner, _, method = name.rpartition(".")
    modes = [
        node.value for node in call.args if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    if any(mode[:1] in "wax" and len(mode) <= 3 for mode in modes):
        return False
    if name in OPENERS or (method in ("read_text", "read_bytes") and owner not in ("", "limits", "files")):
        return True
    is_mode = not call.args or (bool(modes) and set(modes[0]) <= set("rbt+"))
    return method == "open" and not owner.rpartition(".")[2][:1].isupper() and is_mode


def test_whatever_a_stranger_gives_is_opened_by_the_rule() -> None:
    around, met = {}, 0
    for path in sources(ROOT):
        name = path.relative_to(ROOT).as_posix()
        for function, call, goes_by_limits in reads(path):
            met += 1
            if not goes_by_limits and name != "base/limits.py":
                around.setdefault(name, []).append(f"{function}: {call}")
    unknown = {name: calls for name, calls in around.items() if name not in OWN}
    allowed_in_vain = OWN.keys() - around.keys()
    assert met > 40
    assert unknown == {}, "let base/limits.py open it"
    assert allowed_in_vain == set()


@pytest.mark.parametrize(
    "source",
    ["path.read_text()", "open(path)", "path.open()", "path.open('rb')", "np.load(path)", "torch.load(path)",
     "json.load(file)", "pq.ParquetFile(path)", "gzip.open(path)", "files.path.read_bytes()"],
)  # fmt: skip
def test_the_scan_sees_a_read_that_goes_round(source: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(f"def read(path):\n    return {source}\n")
    assert [(function, used) for function, _, used in reads(tmp_path / "a.py")] == [("read", False)]


def test_pictures_are_opened_in_one_place() -> None:
    """With the formats and the limit of pixels that data/samples/images.py has: Pillow opens EPS by Ghostscript."""
    calls = []
    for path in sources(ROOT, "benchmarks"):
        for node in ast.walk(ast.parse(path.read_text())):
            is_open = isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "open"
            if is_open and ast.unparse(node.func).endswith("Image.open"):
                calls.append((path.relative_to(ROOT).as_posix(), ast.unparse(node)))
            if isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                assert "open" not in {alias.name for alias in node.names}, path
    assert calls == [("data/samples/images.py", "Image.open(payload, formats=IMAGE_FORMATS)")]


def test_a_file_may_have_its_limit_and_no_byte_more(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert limits.read_bytes(path, 5) == b"12345"
    with pytest.raises(OSError, match="5 bytes, over the limit of 4 bytes"):
        limits.read_bytes(path, 4)


def test_a_stream_without_an_end_is_left_at_the_limit() -> None:
    with open("/dev/zero", "rb") as endless, pytest.raises(OSError, match="over the limit of 3 MiB"):  # noqa: PTH123
        limits.read_all(endless, 3 << 20, "zeros")


def test_a_file_of_proc_that_has_no_size_has_a_limit() -> None:
    with pytest.raises(OSError, match="over the limit of 1 MiB"):
        limits.read_bytes("/proc/self/pagemap", 1 << 20)


def test_a_line_has_a_limit_and_so_has_what_unfolds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "LINE_BYTES", 8)
    assert list(limits.lines(io.BytesIO(b"1234567\n\n12"), "a")) == [b"1234567\n", b"\n", b"12"]
    with pytest.raises(OSError, match="line 2 has more, over the limit of 8 bytes"):
        list(limits.lines(io.BytesIO(b"1\n12345678\n"), "a"))
    monkeypatch.setattr(limits, "UNFOLD_FREE_BYTES", 1000)
    packed = gzip.compress(b"1234567\n" * 100_000)
    with gzip.open(io.BytesIO(packed)) as stream, pytest.raises(OSError, match="unfolds to more"):
        list(limits.lines(stream, "a", packed_bytes=len(packed)))


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_behind_a_link_too(kind: str, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "link").symlink_to(tmp_path / kind)
    with pytest.raises(OSError, match="directory" if kind == "folder" else "a pipe or device, not a file"):
        limits.check_regular(tmp_path / "link")


def test_json_says_what_is_wrong_and_where(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, reason in (
        (b"[" * 100_000, "nested too deep for a list"),
        (b"\xff", "not valid JSON"),
        (b"{", "not"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a\.json: .*{reason}"):
            limits.read_json(path, "a list")
    with pytest.raises(FileNotFoundError):
        limits.read_json(tmp_path / "b.json")
    path.write_bytes(b" " * 20)
    with pytest.raises(UserError, match=r"a\.json: cannot be read as a list .*over the limit of 10 bytes"):
        limits.read_json(path, "a list", 10)


def test_sizes_of_published_models_are_far_below_the_limits() -> None:
    """Llama 3.1 405B, Gemma 3's vocabulary, Wan's VAE; and what nobody builds is above."""
    published = {
        "num_hidden_layers": 126,
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "vocab_size": 262_208,
    }
    model_sizes.check_sizes({**published, "block_out_channels": [96, 192, 384], "image_size": 1024}, "a")
    for name in published:
        with pytest.raises(UserError, match=rf"a: {name} is 1,000,000,000; no model with more than"):
            model_sizes.check_sizes({"text_config": {name: 10**9}}, "a")
    round_and_round: dict[str, object] = {"num_layers": 2}
    round_and_round["self"] = round_and_round
    model_sizes.check_sizes(round_and_round, "a")
