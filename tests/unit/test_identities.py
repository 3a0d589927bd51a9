"""Every hash, key, fingerprint and digest follows each of its inputs and nothing else; the table leaves none out."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from base import sources
from helpers.data_identities import DATA
from helpers.evaluation_identities import EVALUATION
from helpers.identities import Identity, values
from helpers.model_identities import MODELS
from helpers.run_identities import RUNS
from launch.runs.entry import REPOSITORY

TABLE = DATA + EVALUATION + MODELS + RUNS


def named(rows: tuple[Identity, ...]) -> list[object]:
    return [pytest.param(row, id=f"{number}-{row.name}") for number, row in enumerate(rows)]


@pytest.mark.parametrize("row", named(TABLE))
def test_an_identity_follows_each_of_its_inputs_and_nothing_else(row: Identity, tmp_path: Path) -> None:
    def made(where: str, **changes: object) -> object:
        folder = tmp_path / where
        folder.mkdir(parents=True)
        return row.make(folder, **{**row.inputs, **changes})

    first = made("first")
    assert made("another/place") == first, "the place or the time matters"
    for number, (what, inputs) in enumerate(row.same.items()):
        assert made(f"same-{number}", **inputs) == first, f"{what} matters"
    found = [("first", first)]
    for name, value in row.changed.items():
        found.append((name, made(f"changed-{name}", **{name: value})))
        assert all(found[-1][1] != key for _, key in found[:-1]), f"{name} does not matter"


@pytest.mark.parametrize("name", sorted({row.name for row in TABLE}))
def test_every_input_has_another_value(name: str) -> None:
    rows = [row for row in TABLE if row.name == name]
    tried = {
        one for row in rows for one in (*row.changed, *(key for same in row.same.values() for key in same))
    }
    assert {one for row in rows for one in row.inputs} <= tried


def test_identities_of_data_are_equal_in_every_process(tmp_path: Path) -> None:
    """A set of strings has another order in a process with another seed of Python's own hash."""
    program = (
        "import json, pathlib; from helpers import data_identities, identities; "
        f"print(json.dumps(identities.values(data_identities.DATA, pathlib.Path({str(tmp_path / 'other')!r}))))"
    )
    paths = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "tests")])
    other = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": paths},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(other.stdout.splitlines()[-1]) == values(DATA, tmp_path / "here")


SAYS = re.compile(r"(fingerprints?|digest|identity|hash|hashes|crc32|seed)(_of)?")
"""The last word of a name that says it is an identity."""
HASHES = {"config_hash", "digest", "sha1", "state_hash"}
"""Functions that make an identity of values; base.files.sha256 also checks files, and is left out."""
NOT_IN_THE_TABLE = {
    "base.objective.Objective.fingerprints": "an interface",
    "data.packs.packing._Choices.latent_seed": "hands on data.samples.latents.latent_seed",
    "data.shards.file.write_index": "the sha256 of the bytes that it writes",
    "data.shards.index.Manifest.read": "compares",
    "data.shards.reader.open_shard": "compares an index with the manifest",
    "data.shards.remote_folder.fetch_indices.fetch": "compares an index with the manifest",
    "data.shards.writer.write_manifest": "hands on Manifest.digest",
    "data.sources.deduplicate._hashes": "the rows of _hash_sample",
    "data.sources.folder_walk._identity": "device and inode of a folder, against circles of links",
    "evaluation.features.feature_files.RowFiles.fingerprint": "the function's",
    "evaluation.features.interface.RowFunction.fingerprint": "an interface",
    "evaluation.image_source.Source.digest": "an interface",
    "evaluation.judges.colour.ColourNamer.fingerprint": "an interface",
    "evaluation.judges.detector.Detector.fingerprint": "an interface",
    "evaluation.judges.interface.VisionLanguageJudge.fingerprint": "an interface",
    "evaluation.runner.Suite.fingerprints": "an interface",
    "evaluation.suites.linear_probe.Classifier.fingerprints": "an interface",
    "evaluation.suites.geneval.GenEvalSuite.measure_set": "groups the images of one prompt",
    "launch.evaluate._seed": "reads the seed that images were drawn with",
    "quickstart.pictures.source.EmojiSource._identity": "a sample of the emoji identities",
}


def called(node: ast.AST) -> str:
    """The name of the function that `node` calls; hashlib's sha256 counts as a digest."""
    if not isinstance(node, ast.Call):
        return ""
    if isinstance(node.func, ast.Attribute):
        is_raw = isinstance(node.func.value, ast.Name) and node.func.value.id == "hashlib"
        return "digest" if is_raw else node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def identities_in(path: Path) -> set[str]:
    """Functions and attributes of a source file that make an identity, by their names or by what they call."""
    found = set()

    def walk(node: ast.AST, where: str, owner: str) -> None:
        for child in ast.iter_child_nodes(node):
            name, inside = where, owner
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                name = f"{where}.{child.name}"
                inside = name if isinstance(child, ast.ClassDef) else owner
                if isinstance(child, ast.FunctionDef) and SAYS.fullmatch(child.name.rpartition("_")[2]):
                    found.add(name)
            targets = [child.target] if isinstance(child, ast.AnnAssign) else getattr(child, "targets", [])
            for target in targets:
                if isinstance(target, ast.Attribute) and SAYS.fullmatch(target.attr):
                    found.add(f"{owner}.{target.attr}")
            if called(child) in HASHES:
                found.add(name)
            walk(child, name, inside)

    module = path.relative_to(REPOSITORY).with_suffix("").as_posix().replace("/", ".")
    walk(ast.parse(path.read_text()), module, module)
    return found


def test_no_identity_of_the_sources_is_left_out_of_the_table() -> None:
    """A new fingerprint, digest, hash, identity or seed needs a row, or a reason why it needs none."""
    found = set().union(*map(identities_in, sources(REPOSITORY)))
    known = {name for row in TABLE for name in (row.name, *row.through)} | NOT_IN_THE_TABLE.keys()
    assert sorted(found - known) == []
    assert sorted(NOT_IN_THE_TABLE.keys() - found) == [], "reasons for what is not there"
