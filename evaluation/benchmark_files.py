"""The benchmarks' own files: prompts, questions and judges' instructions, downloaded with pinned hashes or given.

None is part of this project. Licences, as their repositories state them: GenEval MIT; Bagel's rewritten prompts,
DPG-Bench (ELLA) and EditScore Apache-2.0; ImgEdit-Bench's repository states none. GEdit-Bench's rows come from a
data set with terms of its own (stepfun-ai/GEdit-Bench).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from base import files, limits
from base.config import UserError
from evaluation.downloads import fetch

RAW = "https://raw.githubusercontent.com/"


@dataclass(frozen=True)
class BenchmarkFile:
    """One file of a repository at one commit."""

    path: str
    """OWNER/REPOSITORY/COMMIT/path/in/it"""
    sha256: str | None = None
    git_blob: str | None = None
    """Git's hash of the content (SHA-1 with a header), used where no SHA-256 was at hand."""

    @property
    def url(self) -> str:
        """The address that the file is published at."""
        return RAW + self.path


FILES = {
    "geneval": BenchmarkFile(
        "djghosh13/geneval/af4902f24d3ca90ebbb446dd9891a59e0f82725f/prompts/evaluation_metadata.jsonl",
        sha256="5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13",
    ),
    "geneval_rewritten": BenchmarkFile(
        "ByteDance-Seed/Bagel/056b5fd51a88c1eb4547318609e25d40080fcf87/"
        "eval/gen/geneval/prompts/evaluation_metadata_long.jsonl",
        sha256="09472cc9c24e225417b1d5df27e688e5f2a0fcac9ec772f33d9debe4e5d49f27",
    ),
    "dpg": BenchmarkFile(
        "TencentQQGYLab/ELLA/3c228f1dc6c4d3cad0a47493816151a419f14db3/dpg_bench/dpg_bench.csv",
        git_blob="98457fc9901943f51ff9a30367250fc292533bed",
    ),
    "gedit_instructions": BenchmarkFile(
        "VectorSpaceLab/EditScore/6e0f1b9a73b40f227d82d9cb32bd9cfb7189739b/editscore/vie_prompts.py",
        sha256="14dee0ac57433f096ee3c44aa84577576f546c41df56e19b8d85ac44c175aa29",
    ),
    "imgedit": BenchmarkFile(
        "PKU-YuanGroup/ImgEdit/547185d12c08267a862b94248576e1746e479937/Benchmark/Basic/basic_edit.json",
        sha256="5ee9b7d61e918692416f79896300f738598c83adff8de737b25be4aaff72dc69",
    ),
    "imgedit_instructions": BenchmarkFile(
        "PKU-YuanGroup/ImgEdit/547185d12c08267a862b94248576e1746e479937/Benchmark/Basic/prompts.json",
        sha256="f9468dc848776ee0a6c2e2c31e678c7224e9cb61b013747c8c52d4a05627b5a0",
    ),
}


def obtain(name: str, given: Path | None = None, expect_sha256: str | None = None) -> Path:
    """The path of a benchmark's file: `given`, or a download whose hash is checked.

    A given file is not checked unless `expect_sha256` names its hash; the scores record the hash. Raises
    UserError: no such file, no network, another content.
    """
    published = FILES[name]
    if given is not None:
        if not given.is_file():
            raise UserError(f"{given}: no such file; give the benchmark's, or leave it out to download it")
        if expect_sha256 is not None and files.sha256(given) != expect_sha256:
            raise UserError(
                f"{given}: its sha256 is {files.sha256(given)}, not {expect_sha256}; fetch it again"
            )
        return given
    path = fetch(
        published.url,
        published.sha256,
        f"give the path of '{published.url}' yourself",
        unique_name(published),
    )
    if published.git_blob is not None and git_blob_hash(path) != published.git_blob:
        raise UserError(f"{path}: is not the published file (its git hash differs); remove it and try again")
    return path


def git_blob_hash(path: Path) -> str:
    """The hash under which git keeps a file's content."""
    payload = limits.read_bytes(path, limits.DOCUMENT_BYTES)
    return hashlib.sha1(b"blob %d\0" % len(payload) + payload, usedforsecurity=False).hexdigest()


def unique_name(file: BenchmarkFile) -> str:
    """The file's name in the cache, which holds files of several repositories."""
    owner, repository, commit, *_, name = file.path.split("/")
    return f"{owner}-{repository}-{commit[:8]}-{name}"
