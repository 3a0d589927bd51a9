"""Every command with an --out, root= or run_dir=: no byte of another's is lost, wherever the output goes.

The commands are found by going over launch/ and quickstart/. Each is run once into a new folder; then a stranger's
file is put under every name that it wrote, and the same command must be refused with one line and leave the
tree as it was (or, where that name is a folder, write beside what is in it).
"""

from __future__ import annotations

import csv
import importlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import webdataset
from PIL import Image

from base import files
from data.shards import ShardDataset
from engine import distributed
from launch.runs import entry, training
from quickstart import chain as quickstart

ROOT = Path(__file__).parents[2]
WRITES_NOTHING = {"check_nodes", "preflight", "recipes"}
"""Their scratch files have names of their own, beside the run_dir or in it, and are removed."""


@dataclass(frozen=True)
class Command:
    """A command line; `inputs`: a folder of its own copies, `out`: where it writes."""

    module: str
    arguments: Callable[[Path, Path], list[object]]
    inputs: tuple[str, ...] = ()
    """Entries of `inputs` that it reads."""
    victims: tuple[str, ...] = ()
    """Names it would write, of commands that take too long to be run here; they must be refused before they read."""
    is_file: str = ""
    """Suffix of `out`, where that is a file."""


def train(module: str) -> Command:
    names = ("config.json", "metrics.jsonl", "checkpoints", "export", "samples", "evaluation", ".lock")
    config = {"class": "quickstart_class/rpiae", "tokenizer": "quickstart/pivot"}.get(
        module, f"quickstart/{module}"
    )
    given = ["--config", ROOT / f"configs/{config}.yaml"]
    return Command(f"train_{module}", lambda _, out: [*given, f"run_dir={out}"], victims=names)


def chain(module: str) -> list[Command]:
    names = ("steps", "logs", "data", "evaluation", "durations.json")
    return [
        Command(module, lambda _, out: [f"root={out}"], victims=names),
        Command(module, lambda _, out: ["--fresh", f"root={out}"], victims=("thesis.txt", "data")),
    ]


COMMANDS = [
    Command(
        "train_text_tokenizer",
        lambda i, out: ["--shards", i / "shards", "--vocab-size", 400, "--out", out],
        ("shards",),
    ),
    Command("make_shards", lambda i, out: ["folder", "--images", i / "images", "--out", out], ("images",)),
    Command("make_shards", lambda i, out: ["webdataset", "--tars", i / "tars", "--out", out], ("tars",)),
    Command(
        "make_shards",
        lambda i, out: ["webdataset", "--tars", *sorted((i / "tars").glob("*.tar")), "--out", out],
        ("tars",),
    ),
    Command(
        "make_shards",
        lambda i, out: [
            *("cc12m", "--tars", *sorted((i / "tars").glob("*.tar"))),
            *("--captions", i / "tars/captions.jsonl", "--join", "key", "--out", out),
        ],
        ("tars",),
    ),
    Command(
        "make_shards",
        lambda i, out: ["doctor", i / "shards", "--processes", 1, "--out", out],
        ("shards",),
        is_file=".html",
    ),
    Command(
        "encode_latents",
        lambda i, out: [
            *("--config", i / "latents.yaml", f"shards={i / 'shards'}", f"out={out}"),
            f"autoencoder={i / 'autoencoder'}",
        ],
        ("shards", "autoencoder"),
    ),
    Command(
        "reconstruct",
        lambda i, out: ["--autoencoder", i / "autoencoder", "--images", i / "images", "--out", out],
        ("images", "autoencoder"),
    ),
    Command(
        "evaluate",
        lambda i, out: [
            *("reconstruction", "--images", i / "set", "--inception", "none", "--vgg16", "none", "--out", out),
        ],
        ("set",),
    ),
    Command(
        "evaluate",
        lambda i, out: ["prompts", "dpg", "--file", i / "dpg/dpg.csv", "--out", out],
        ("dpg",),
    ),
    Command("evaluate", lambda i, out: ["report", i / "scores", "--out", out], ("scores",), is_file=".html"),
    Command("watch", lambda i, out: [i / "run", "--once", "--html", out], ("run",), is_file=".html"),
    Command("sample", lambda i, out: ["--run", i, "--prompt", "a", "--out", out], victims=("",), is_file=".png"),
    Command("readme_picture", lambda i, out: ["--root", i, "--out", out], victims=("",), is_file=".png"),
    Command("export", lambda i, out: ["--run", i, "--out", out], victims=("config.json",)),
    Command("export_bagel", lambda i, out: ["--generator", i, "--out", out], victims=("ema.safetensors",)),
    Command("import_release", lambda i, out: ["rae", "--source", i, "--out", out], victims=("config.json",)),
    Command("make_data", lambda _, out: ["--out", out], victims=("scenes-train/manifest.json",)),
    *map(train, ("class", "edit", "judge", "standin", "t2i", "tokenizer")),
    *(command for module in ("chain", "class_chain", "ablation") for command in chain(module)),
]  # fmt: skip
IMAGE_SETS = {"sample_class"}
"""They write by generator.draw_on_ranks.draw_on_ranks: tests/unit/base/test_own_files.py."""
FOLDER_OF = {
    path.stem: path.parent.name
    for folder in ("launch", "quickstart")
    for path in (ROOT / folder).glob("*.py")
    if "__main__" in path.read_text()
}
RUN_HERE = [command for command in COMMANDS if command.inputs]


def name_of(command: Command) -> str:
    return f"{command.module}-{COMMANDS.index(command)}"


def test_every_command_stands_in_the_table() -> None:
    assert {*FOLDER_OF} == {command.module for command in COMMANDS} | WRITES_NOTHING | IMAGE_SETS


@pytest.fixture(autouse=True)
def alone(monkeypatch) -> None:
    """One rank, without a process group: with one, entry.run would end this process."""
    ranks = SimpleNamespace(rank=0, world=1, device="cpu", barrier=lambda: None)
    monkeypatch.setattr(distributed, "start", lambda *_: ranks)
    monkeypatch.setattr(distributed, "stop", lambda: None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, emoji_shards, tiny_autoencoder) -> Path:
    root: Path = tmp_path_factory.mktemp("own") / "inputs"
    emoji_shards(root / "shards", "scenes-train", 8, 4)
    for sample in ShardDataset.open(root / "shards").read(range(2)):
        (root / "images").mkdir(exist_ok=True)
        (root / "images" / f"{sample.key}.png").write_bytes(sample.parts["png"])
        (root / "images" / f"{sample.key}.txt").write_text("a caption of three words")
    (root / "tars").mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(root / f"tars/shard-{number:06d}.tar")) as tar:
            image = (
                root / "images" / sorted(path.name for path in (root / "images").glob("*.png"))[number]
            ).read_bytes()
            tar.write(
                {
                    "__key__": f"k{number}",
                    "png": image,
                    "txt": "a dog",
                    "json": json.dumps({"key": f"k{number}"}).encode(),
                }
            )
    (root / "tars/captions.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "key": f"k{n}",
                    **dict.fromkeys(("caption_llava", "caption_llava_short", "caption"), "a dog"),
                }
            )
            + "\n"
            for n in range(2)
        )
    )
    tiny_autoencoder(root / "autoencoder")
    (root / "latents.yaml").write_text(
        f"autoencoder: {root}\nshards: {root}\nout: {root}\ndtype: fp32\ntext_tokenizer: {root}/text\n"
    )
    text = ["--shards", root / "shards", "--vocab-size", 400, "--out", root / "text"]
    assert call("train_text_tokenizer", text) == 0
    for index, role in enumerate(("result", "original")):
        (root / "set").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (90 * index, 8, 7)).save(root / f"set/{role}.png")
    item = {"key": "a", "images": {"result": "result.png", "original": "original.png"}, "meta": {}}
    (root / "set/manifest.jsonl").write_text(json.dumps(item) + "\n")
    (root / "dpg").mkdir()
    with (root / "dpg/dpg.csv").open("w", newline="") as file:
        columns = ["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"]
        csv.writer(file).writerows([columns, ["p1", "a dog", 1, "0", "entity - whole (dog)", "A dog?"]])
    arguments = ["reconstruction", "--images", root / "set", "--inception", "none", "--vgg16", "none"]
    assert call("evaluate", [*arguments, "--out", root / "scores"]) == 0
    files.write_json(root / "run/config.json", {"engine": {"steps": 2}, "run_dir": "a"})
    files.write_text(root / "run/metrics.jsonl", json.dumps({"step": 1, "loss": 1.0, "time_s": 1.0}) + "\n")
    return root


def call(module: str, arguments: list[object]) -> int:
    """Exit status of `FOLDER/MODULE.py ARGUMENTS`."""
    command = importlib.import_module(f"{FOLDER_OF[module]}.{module}")
    old, sys.argv = sys.argv, [f"{module}.py", *map(str, arguments)]
    try:
        return entry.run(command.main, has_ranks=False)
    finally:
        sys.argv = old


def contents(root: Path) -> dict[str, str]:
    """Every file below `root` and its hash; folders too."""
    return {
        path.relative_to(root).as_posix(): files.sha256(path) if path.is_file() else "folder"
        for path in root.rglob("*")
    }


def plant(path: Path, *, as_folder: bool) -> None:
    """A stranger's file, or folder with one."""
    target = path / "thesis.txt" if as_folder else path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("years of work")


@pytest.mark.parametrize("command", COMMANDS, ids=name_of)
def test_a_strangers_files_are_refused_by_name_and_kept(
    command, inputs, tmp_path, capfd, monkeypatch
) -> None:
    for module, name in ((quickstart, "run_steps"), (training, "_train")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("was not refused"))
    mine = tmp_path / "inputs"
    mine.mkdir()
    for name in (*command.inputs, "latents.yaml"):
        place = inputs / name
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, mine / name)
    kinds = {name: "." not in name.removeprefix(".") for name in command.victims}
    if command.inputs:
        new = tmp_path / f"new{command.is_file}"
        assert call(command.module, command.arguments(mine, new)) == 0, capfd.readouterr().err
        written = (
            [new] if command.is_file else [path for path in new.iterdir() if not path.name.startswith(".")]
        )
        kinds = {"" if command.is_file else path.name: path.is_dir() for path in written}
        assert call(command.module, command.arguments(mine, new)) == 0, "the same again goes on"
    assert kinds
    for number, (name, is_folder) in enumerate(sorted(kinds.items())):
        out = tmp_path / f"out{number}{command.is_file}"
        plant(out / name if name else out, as_folder=is_folder)
        before = contents(tmp_path)
        capfd.readouterr()
        status = call(command.module, command.arguments(mine, out))
        err = capfd.readouterr().err
        after = contents(tmp_path)
        if status == 0 and is_folder:  # it wrote beside the stranger's file, under names of its own
            assert {path: after.get(path) for path in before} == before
            continue
        assert after == before, f"{name}: {err}"
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert status == 2 and len(lines) == 1 and str(out) in lines[0], f"{name}: {err}"


@pytest.mark.parametrize("where", ["equal", "inside", "above"])
@pytest.mark.parametrize("command", RUN_HERE, ids=name_of)
def test_the_input_is_whole_wherever_the_output_goes(command, where, inputs, tmp_path) -> None:
    for name in (*command.inputs, "latents.yaml"):
        place = inputs / name
        (shutil.copytree if place.is_dir() else shutil.copyfile)(place, tmp_path / name)
    before = contents(tmp_path)
    first = tmp_path / command.inputs[0]
    out = {"equal": first, "inside": first / "inside", "above": tmp_path}[where]
    if command.is_file:
        out = {
            "equal": sorted(path for path in first.iterdir() if path.is_file())[0],
            "inside": out / "a.html",
        }.get(where, out)
    call(command.module, command.arguments(tmp_path, out))
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
