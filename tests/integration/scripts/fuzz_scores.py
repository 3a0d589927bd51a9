"""Benchmarks' files, judges' answers, scores and logs, for the fuzz run."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import socket
import threading
from pathlib import Path

import numpy as np
import torch

from data.image_set import ImageSet
from evaluation.judge_instructions import ImgEditInstructions, VieInstructions
from evaluation.judges.endpoint import EndpointJudge
from evaluation.metrics.dpg import answer, read_graphs
from evaluation.metrics.geneval import Detection, check_metadata, verdict
from evaluation.metrics.vie import read_scores, read_three_ratings
from evaluation.prompt_sets import write_gedit, write_imgedit
from evaluation.reference import Reference
from evaluation.store import RecordStore
from generator.prompts import read_prompts
from integration.scripts.fuzz_inputs import IMAGE, Case, lines, parquet_of, png, put
from report import benchmarks, render_report
from report.watch import page, read_run, screen


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


CASES: dict[str, Case] = {
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
    "image set": Case(class_folder, read_images),
    "statistics": Case(statistics, lambda folder: Reference.open(folder / "a.npz")),
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
