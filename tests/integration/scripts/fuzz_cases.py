"""What the fuzz run changes: a tiny valid input of each kind, and who reads it."""

from __future__ import annotations

import contextlib
import csv
import gzip
import importlib.util
import io
import json
import socket
import tarfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from PIL import Image

from data.doctor import diagnose
from data.images import decode_image, image_parts, read_rgb_file
from data.latents import read_latents
from data.quarantine import read_quarantine
from data.shard_indexing import index_shards
from data.shards import LatentInfo, Sample, ShardDataset, shard_name, write_manifest, write_shard
from data.sources.base import BadItemError, InUnits, Source
from data.sources.caption_table import CaptionTable, build_caption_table
from data.sources.folder import FolderSource
from data.sources.imagenet import ImageNetSource
from data.sources.omniedit import OmniEditFilter, omniedit_source
from data.sources.parquet import ParquetColumns, ParquetSource
from data.sources.prepare import Preparation
from data.sources.tar_samples import find_tars
from data.sources.webdataset import WebDatasetSource
from data.text import load_text_tokenizer, train_text_tokenizer
from data.verify import verify
from engine import checkpoint_export, checkpoint_folder, checkpoint_writer, config, files
from engine.config import UserError
from engine.layout import Segment
from evaluation.judge_instructions import ImgEditInstructions, VieInstructions
from evaluation.judges.emoji import Judge, JudgeConfig, JudgeExport, SceneClasses
from evaluation.judges.emoji_network import JudgeNetwork
from evaluation.judges.endpoint import EndpointJudge
from evaluation.manifest import ImageSet
from evaluation.metrics.dpg import answer, read_graphs
from evaluation.metrics.geneval import Detection, check_metadata, verdict
from evaluation.metrics.vie import read_scores, read_three_ratings
from evaluation.prompt_sets import write_gedit, write_imgedit
from evaluation.reference import Reference
from evaluation.report import benchmarks, render_report
from evaluation.store import RecordStore
from evaluation.watch import page, read_run, screen
from generator.prompts import read_prompts
from launch import run_kinds
from launch.runs import EncodeRun, JudgeRun, StandInRun
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.weights import write_tensors

ROOT = Path(__file__).parents[3]


def module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / "tests" / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


exports = module_at("unit/test_strange_exports.py")


@dataclass(frozen=True)
class Case:
    """An input and who reads it."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    pattern: str = "*"
    """Files that are changed."""
    sign: Callable[[Path], object] | None = None
    """Puts checksums right after a change, as who wants to deceive would."""


# --- inputs


def png(side: int = 9, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.arange(side * side * 3, dtype=np.uint8).reshape(side, side, 3)).save(buffer, kind)
    return buffer.getvalue()


def put(folder: Path, contents: dict[str, bytes | str | object]) -> None:
    """Files by name: bytes, text, or a value as JSON."""
    for name, content in contents.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not isinstance(content, bytes | str):
            content = json.dumps(content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def lines(*rows: object) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def tar_of(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, payload in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return buffer.getvalue()


def parquet_of(**columns: list[Any]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer, row_group_size=2)
    return buffer.getvalue()


IMAGE = {"bytes": png(), "path": None}


def pixel_shards(folder: Path) -> None:
    trees = [{"captions": {"alt": f"a red square {n}"}, "width": 9} for n in range(3)]
    samples = [
        Sample(f"k{n}", {"png": png(), "json": json.dumps(tree).encode()}) for n, tree in enumerate(trees)
    ]
    write_set(folder, samples, None)


def latent_shards(folder: Path) -> None:
    latent = LatentInfo("fp32", (2, 2, 2), (0.0, 0.5), (1.0, 2.0), "autoencoder", "text")
    payload = np.arange(latent.num_bytes // 4, dtype=np.float32).tobytes()
    samples = [Sample(f"k{n}", {"latent": payload, "json": b'{"caption": "a dog"}'}) for n in range(3)]
    write_set(folder, samples, latent)


def write_set(folder: Path, samples: Sequence[Sample], latent: LatentInfo | None) -> None:
    write_shard(folder / shard_name(0), samples, [(4, 3)] * len(samples), source="test")
    write_manifest(folder, [shard_name(0)], source="test", latent=latent)


def sign_shards(folder: Path) -> None:
    path = folder / "manifest.json"
    tree = json.loads(path.read_bytes())
    for entry in tree["shards"]:
        tar = folder / entry["name"]
        entry["num_bytes"] = tar.stat().st_size
        entry["index_sha256"] = files.sha256(tar.with_name(tar.name.replace(".tar", ".index.npy")))
    tree["fingerprint"] = files.digest({**tree, "fingerprint": ""})
    path.write_text(json.dumps(tree))


def checkpoint(folder: Path) -> None:
    model = torch.nn.Linear(3, 2)
    directory = folder / "step_00000003"
    directory.mkdir()
    shapes = {f"module.{name}": list(parameter.shape) for name, parameter in model.named_parameters()}
    flats = [
        checkpoint_writer.Flat(
            "main/master", parameter.detach().flatten(), [Segment(f"module.{name}", 0, parameter.numel(), 0)]
        )
        for name, parameter in model.named_parameters()
    ]
    total = checkpoint_writer.write(directory / checkpoint_folder.file_name(0), flats)
    checkpoint_folder.write_state(
        directory,
        {
            "format": checkpoint_folder.FORMAT,
            "step": 3,
            "num_ranks": 1,
            "ema_decays": [],
            "fingerprints": {"data": "a"},
            "engines": {"main": {"shapes": shapes}},
            "files": {checkpoint_folder.file_name(0): {"bytes": total.num_bytes, "crc32": total.crc32}},
        },
    )


def sign_checkpoint(folder: Path) -> None:
    for path in folder.glob("*/state.json"):
        state = json.loads(path.read_bytes())
        for name, entry in state["files"].items():
            content = (path.parent / name).read_bytes()
            entry |= {"bytes": len(content), "crc32": checkpoint_writer.isal_zlib.crc32(content)}
        checkpoint_folder.write_state(path.parent, state)


def judge_export(folder: Path) -> None:
    network, classes = JudgeConfig((8, 8, 8)), SceneClasses(("apple", "dog"), ("red", "blue"))
    files.write_json(folder / "config.json", config.to_dict(JudgeExport(network, classes)))
    write_tensors(folder / "model.safetensors", JudgeNetwork(network, classes))


def torch_file(folder: Path) -> None:
    torch.save(
        {"ema": {"module.a": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}, "step": 7},
        folder / "a.pt",
    )


def text_model(folder: Path) -> None:
    train_text_tokenizer(["a red apple on blue", "two dogs beside a small green house"], folder / "text", 400)


def class_folder(folder: Path) -> None:
    row = {
        "key": "n/a",
        "images": {"result": "a.png", "original": "b.png"},
        "meta": {"caption": "x", "label": 0},
    }
    put(folder, {"a.png": png(), "b.png": png(), "manifest.jsonl": lines(row, {**row, "key": "b"})})


def scores(folder: Path) -> None:
    """What evaluation.runner writes, and a training's log beside it."""
    row = {"key": "a", "images": {"result": "a.png", "source": "a.png", "original": "a.png"}}
    meta = {"caption": "a dog", "instruction": "add a hat"}
    estimate = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 1}
    for name, metrics in METRICS.items():
        values = {metric: 1.5 if metric.endswith("_db") else False for metric in metrics}
        put(
            folder / "evaluation" / name,
            {
                "scores.json": {
                    "suite": name,
                    "images": "images",
                    "scores": dict.fromkeys(metrics, estimate),
                    "seed": 0,
                    "partial": False,
                    "groups": {"single": dict.fromkeys(metrics, estimate)},
                    "n": 1,
                    "n_failed": 0,
                    "protocol": {"judge": {"name": "x"}},
                    "fingerprints": {"judge": "a" * 64},
                    "versions": {"torch": "2"},
                },
                "per_item.jsonl": lines(
                    {
                        "key": "a",
                        "values": values,
                        "groups": ["single"],
                        "detail": {"seen": ["dog"], "background": "red", "reasons": ["no hat"]},
                    }
                ),
                "images/manifest.jsonl": lines({**row, "meta": meta}),
                "images/a.png": png(),
            },
        )
    put(folder, {"durations.json": [{"name": "t2i", "seconds": 12.5}], "notes.json": ["A stand-in judges."]})
    put(
        folder / "t2i",
        {"metrics.jsonl": lines({"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "step_s": 0.1})},
    )


METRICS = {
    "reconstruction": ("psnr_db", "ssim"),
    "t2i": ("object_right", "background_right", "relation_right"),
    "edit": ("change_done", "psnr_outside_db"),
}


def run_folder(folder: Path) -> None:
    rows = [{"step": n, "loss": 1 / n, "time_s": 1e9 + n, "data_share": 0.2, "lr": 1e-4} for n in (1, 2, 3)]
    events = [
        {"time_s": 1e9 + n, "step": n, "kind": kind, "text": "x"}
        for n, kind in ((0, "start"), (3, "checkpoint"))
    ]
    put(
        folder,
        {
            "metrics.jsonl": lines(*rows),
            "events.jsonl": lines(*events),
            "samples/step_00000002.png": png(),
            "config.json": {"engine": {"steps": 9, "precision": "bf16"}},
            "scores.jsonl": lines({"step": 2, "t2i/fid": 3.0}),
        },
    )


def graph_table(folder: Path) -> None:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"])
    writer.writerow(["a", "a dog", 1, 0, "entity - whole (dog)", "Is there a dog?"])
    writer.writerow(["a", "a dog", 2, 1, "attribute - color (dog, red)", "Is it red?"])
    put(folder, {"g.csv": out.getvalue()})


def statistics(folder: Path) -> None:
    arrays = {"arr_0": np.zeros((4, 8, 8, 3), np.uint8), "mu": np.zeros(4), "sigma": np.eye(4)}
    np.savez(folder / "a.npz", **arrays)


def http_answer(folder: Path) -> None:
    text = 'fine {"score": [7, 8]}'
    body = json.dumps(
        {
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
            "error": {"code": 1, "message": "x"},
        }
    )
    put(folder, {"a.http": f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n{body}"})


def instructions(folder: Path) -> None:
    names = (
        "_context_no_delimit_reasoning_first",
        "_prompts_0shot_two_image_edit_rule",
        "_prompts_0shot_tie_rule_SC",
    )
    texts = [f'{name} = """of 10: <instruction>"""' for name in (*names, "_prompts_0shot_rule_PQ")]
    put(folder, {"vie_prompts.py": "import os\n" + "\n".join(texts) + "\n"})
    put(folder, {"prompts.json": {"replace": "is <edit_prompt> done?", "add": "is <edit_prompt> there?"}})


# --- readers


def everything(source: Source) -> None:
    prepare = Preparation(encoding="png")
    for unit in range(len(source.units)):
        for item in source.items(unit):
            with contextlib.suppress(BadItemError):
                if isinstance(item, Sample):
                    prepare(item)


def read_shards(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    for sample in dataset.read(range(len(dataset))):
        for part in image_parts(sample.parts):
            decode_image(sample, part)


def read_latent_shards(folder: Path) -> None:
    dataset = ShardDataset.open(folder)
    latent = dataset.manifest.latent
    if latent is not None:
        read_latents(dataset.read(range(len(dataset))), ["latent"], latent)


def read_indexed(folder: Path) -> None:
    index_shards(folder)
    read_shards(folder)


def read_checkpoints(folder: Path) -> None:
    directory, state = checkpoint_export.find(folder, "latest")
    checkpoint_export.load(directory, state, torch.nn.Linear(3, 2), None)


def read_pages(folder: Path) -> None:
    benchmarks.page([benchmarks.read_run(folder)])


def watch(folder: Path) -> None:
    run = read_run(folder)
    page([run], now_s=1e9)
    screen([run], ["loss"], width=80, height=30, now_s=1e9)


def read_images(folder: Path) -> None:
    images = ImageSet.open(folder)
    for role in ("result", "original"):
        images.read_all(images.items, role)
    Reference.open(folder)


def read_answers(folder: Path) -> None:
    """What the server says is what the file says, to every request."""
    reply = (folder / "a.http").read_bytes()
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                peer = server.accept()[0]
            except OSError:  # shut down
                return
            with contextlib.suppress(OSError, IndexError, ValueError), peer:
                peer.settimeout(1)
                asked = b""
                while b"\r\n\r\n" not in asked:
                    asked += peer.recv(1 << 16)
                length = int(asked.lower().split(b"content-length:")[1].split()[0])
                while len(asked.partition(b"\r\n\r\n")[2]) < length:
                    asked += peer.recv(1 << 16)
                peer.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        judge = EndpointJudge(f"http://127.0.0.1:{server.getsockname()[1]}/v1", "m", sleep=lambda _: None)
        said = judge([torch.zeros(3, 4, 4, dtype=torch.uint8)], "what?", 0)
        said.encode()
        for read in (lambda text: read_scores(text, 10), read_three_ratings, answer):
            read(said)
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        thread.join()


def read_verdicts(folder: Path) -> None:
    for prompt in read_prompts(folder / "g.jsonl"):
        check_metadata(prompt.meta, prompt.key)
        verdict(prompt.meta, [Detection("dog", 0.95, (0.0, 0.0, 4.0, 4.0))])


def captions_of(folder: Path) -> None:
    paths = sorted(folder.glob("*.json*")) + sorted(folder.glob("*.parquet"))
    build_caption_table(paths, folder / "t.sqlite", columns={"caption": "alt"})
    with contextlib.suppress(BadItemError):
        CaptionTable(folder / "t.sqlite").find("a", "1", "http://x/1.png")


CONFIGS = {
    "tokenizer/pivot.yaml": run_kinds.read_run,
    "tokenizer/decoder.yaml": run_kinds.read_run,
    "generator/edit_omniedit.yaml": run_kinds.read_run,
    "generator/class/ditdh_raw_adaptive.yaml": run_kinds.read_run,
    "latents/cc12m.yaml": lambda path: config.load(EncodeRun, path).configs(),
    "quickstart/standin.yaml": lambda path: config.load(StandInRun, path),
    "quickstart/judge.yaml": lambda path: config.load(JudgeRun, path),
}


def configs(folder: Path) -> None:
    found = {name: ROOT / "configs" / name for name in CONFIGS}
    for name, path in found.items():
        if path.is_file():
            put(folder, {name: yaml.safe_dump(config.resolve(path))})


def read_configs(folder: Path) -> None:
    for name, read in CONFIGS.items():
        if (folder / name).is_file():
            with contextlib.suppress(UserError):  # one file is changed, and all are read
                read(str(folder / name))


WEBDATASET = {
    "a.png": png(),
    "a.json": b'{"caption": "a dog", "url": "http://x/1", "label": 0}',
    "a.txt": b"a dog",
    "b.jpg": png(9, "JPEG"),
    "b.txt": b"two dogs",
    "b.cls": b"0",
}
CASES: dict[str, Case] = {
    **{f"export {name}": Case(save, load) for name, (save, load) in exports.EXPORTS.items()},
    "judge's export": Case(judge_export, Judge.load),
    "text tokenizer": Case(
        text_model, lambda folder: load_text_tokenizer(str(folder / "text")).encode("a dog")
    ),
    "checkpoint": Case(checkpoint, read_checkpoints, sign=sign_checkpoint),
    "torch file": Case(torch_file, lambda folder: read_checkpoint(folder / "a.pt")),
    "pixel shards": Case(pixel_shards, read_shards, sign=sign_shards),
    "latent shards": Case(latent_shards, read_latent_shards, sign=sign_shards),
    "doctor": Case(pixel_shards, diagnose, sign=sign_shards),
    "verify": Case(latent_shards, verify, sign=sign_shards),
    "tars in place": Case(lambda folder: put(folder, {"a.tar": tar_of(WEBDATASET)}), read_indexed),
    "tars": Case(
        lambda folder: put(folder, {"a.tar": tar_of(WEBDATASET)}),
        lambda folder: everything(WebDatasetSource(find_tars([folder]))),
    ),
    "imagenet": Case(
        lambda folder: put(
            folder, {f"n0000000{n}.tar": tar_of({f"n0000000{n}_1.JPEG": png(9, "JPEG")}) for n in (1, 2)}
        ),
        lambda folder: everything(InUnits(ImageNetSource(folder, num_classes=2), 2)),
    ),
    "parquet": Case(
        lambda folder: put(
            folder,
            {"a.parquet": parquet_of(image=[IMAGE] * 3, text=["a dog", "x", "y"], key=["a", "b", "c"])},
        ),
        lambda folder: everything(
            ParquetSource(
                [str(folder)], ParquetColumns(image="image", captions=("text",), key="key", kept=("key",)), 2
            )
        ),
    ),
    "parquet of classes": Case(
        lambda folder: put(folder, {"a.parquet": parquet_of(image=[IMAGE] * 3, label=[0, 1, 2])}),
        lambda folder: everything(
            ParquetSource([str(folder)], ParquetColumns(image="image", label="label"), 2)
        ),
    ),
    "omniedit": Case(
        lambda folder: put(
            folder,
            {
                "a.parquet": parquet_of(
                    omni_edit_id=["x", "y"],
                    task=["swap"] * 2,
                    src_img=[IMAGE] * 2,
                    edited_img=[IMAGE] * 2,
                    edited_prompt_list=[["add a hat"]] * 2,
                    sc_score_1=[3, 4],
                    sc_score_2=[3, 4],
                    pq_score=[1.0, 2.0],
                    o_score=[7.0, 8.0],
                )
            },
        ),
        lambda folder: everything(omniedit_source([str(folder)], 2, OmniEditFilter({"o_score": 6}))),
    ),
    "gedit": Case(
        lambda folder: put(
            folder,
            {
                "a.parquet": parquet_of(
                    key=["a", "b"],
                    task_type=["t"] * 2,
                    instruction=["i"] * 2,
                    instruction_language=["en"] * 2,
                    input_image=[IMAGE] * 2,
                )
            },
        ),
        lambda folder: write_gedit([folder / "a.parquet"], folder / "out"),
    ),
    "imgedit": Case(
        lambda folder: put(
            folder, {"e.json": {"1": {"id": "a.png", "prompt": "x", "edit_type": "add"}}, "a.png": png()}
        ),
        lambda folder: write_imgedit(folder / "e.json", folder, folder / "out"),
        "e.json",
    ),
    "dpg": Case(graph_table, lambda folder: read_graphs(folder / "g.csv")),
    "listing": Case(
        lambda folder: put(
            folder,
            {
                "images/a.png": png(),
                "images/b.jpg": png(9, "JPEG"),
                "list.jsonl": lines(
                    {"file": "a.png", "caption": "a dog"}, {"file": "b.jpg", "captions": {"alt": "x"}, "n": 1}
                ),
            },
        ),
        lambda folder: everything(InUnits(FolderSource(folder / "images", folder / "list.jsonl"), 3)),
    ),
    "folder": Case(
        lambda folder: put(
            folder, {"a.png": png(), "a.txt": "a dog", "b.png": png(), "b.txt": "x", "c.webp": png(9, "WEBP")}
        ),
        lambda folder: everything(InUnits(FolderSource(folder), 3)),
    ),
    "caption tables": Case(
        lambda folder: put(
            folder,
            {
                "a.jsonl": lines(
                    {"key": "1", "url": "http://x/1.png", "caption": "a dog"},
                    {"key": "2", "url": "", "caption": "x"},
                ),
                "b.jsonl.gz": gzip.compress(lines({"key": "3", "url": "http://x/3.png", "caption": "a dog"})),
                "c.parquet": parquet_of(key=["4"], url=["http://x/4.png"], caption=["x"]),
            },
        ),
        captions_of,
    ),
    "pictures": Case(
        lambda folder: put(folder, {"a.png": png(), "b.jpg": png(9, "JPEG"), "c.webp": png(9, "WEBP")}),
        lambda folder: [read_rgb_file(path) for path in sorted(folder.iterdir())],
    ),
    "image set": Case(class_folder, read_images),
    "statistics": Case(statistics, lambda folder: Reference.open(folder / "a.npz")),
    "quarantine": Case(
        lambda folder: put(
            folder,
            {"q.jsonl": lines({"key": "a", "reason": "x"}, {"shard": "shard-000000.tar", "reason": "y"})},
        ),
        lambda folder: read_quarantine(folder / "q.jsonl"),
    ),
    "prompts": Case(
        lambda folder: put(
            folder,
            {
                "p.jsonl": lines(
                    {"key": "a", "prompt": "a dog", "seed": 3}, {"image": "a.png", "instruction": "add a hat"}
                ),
                "p.txt": "a dog\na cat\n",
                "a.png": png(),
            },
        ),
        lambda folder: [read_prompts(folder / name) for name in ("p.jsonl", "p.txt")],
    ),
    "geneval": Case(
        lambda folder: put(
            folder,
            {
                "g.jsonl": lines(
                    {
                        "prompt": "a dog",
                        "tag": "single_object",
                        "include": [{"class": "dog", "count": 1}],
                        "exclude": [],
                    }
                )
            },
        ),
        read_verdicts,
    ),
    "instructions": Case(
        instructions,
        lambda folder: [
            VieInstructions.read(folder / "vie_prompts.py"),
            ImgEditInstructions.read(folder / "prompts.json"),
        ],
    ),
    "configs": Case(configs, read_configs),
    "answers": Case(http_answer, read_answers),
    "records": Case(
        lambda folder: put(
            folder, {"records-00000.jsonl": lines({"item": "a", "pass": 0, "config": "c", "value": [1, 2]})}
        ),
        lambda folder: RecordStore(folder),
    ),
    "scores": Case(scores, read_pages, "evaluation/**/*"),
    "report": Case(scores, render_report),
    "watch": Case(run_folder, watch),
}
