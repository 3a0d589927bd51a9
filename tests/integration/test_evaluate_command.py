"""launch/evaluate.py from the command line on tiny sets: scores, calibration, prompts, report; killed and resumed."""

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from base.config import UserError
from data.image_set import Item, write_image, write_manifest
from evaluation import benchmark_files, calibration
from evaluation.benchmark_files import FILES, git_blob_hash, obtain
from evaluation.features import feature_files
from evaluation.features.representation import RepresentationFeatures
from evaluation.suites import reconstruction as reconstruction_suite
from generator.prompts import read_prompts
from launch import evaluate as command
from quickstart.config import StandInConfig
from quickstart.standin import IdentityObjective
from report.benchmarks import failed_items, page, read_run
from report.comparison import Paired, paired
from report.paper_tables import TABLES
from tokenizer.config import RepresentationConfig

TINY = RepresentationConfig(
    name="vit_tiny_patch16_224",
    input_px=32,
    weights="random",
    overrides={"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stand-in network, 130 samples, and a reference of 70 images as ADM stores them."""
    root = tmp_path_factory.mktemp("evaluate")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        objective = IdentityObjective(StandInConfig(TINY, num_classes=4))
    (root / "standin/export").mkdir(parents=True)
    objective.export(root / "standin/export")
    generator = torch.Generator().manual_seed(1)
    items = []
    for index, pixels in enumerate(
        torch.randint(0, 200, (130, 3, 16, 16), generator=generator).to(torch.uint8)
    ):
        write_image(root / "set" / f"{index}.png", pixels)
        items.append(Item(f"{index:03d}", {"result": f"{index}.png"}, {"prompt": f"<thing {index}>"}))
    write_manifest(root / "set", items)
    real = torch.randint(20, 220, (70, 16, 16, 3), generator=generator).to(torch.uint8).numpy()
    np.savez(root / "real.npz", arr_0=real)
    return root


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    command.main()


def generation(folder: Path, out: Path) -> list[object]:
    networks = ["--inception", "none", "--features", folder / "standin/export"]
    return [
        "generation",
        "--images",
        folder / "set",
        "--reference",
        folder / "real.npz",
        "--out",
        out,
        *networks,
    ]


def test_generation_scores_are_printed_and_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(monkeypatch, *generation(folder, tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "precision_features: " in printed and ", n = 130" in printed and "feature_distance: " in printed
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["suite"] == "generation" and scores["protocol"]["other"]["network"].startswith("standin")


def reconstruction(folder: Path, out: Path) -> list[object]:
    """Every image of the set against the one that is as far from the end."""
    lines = []
    for index in range(130):
        names = {"result": f"{index}.png", "original": f"{129 - index}.png"}
        lines.append(json.dumps({"key": str(index), "images": names, "meta": {}}))
    (out.parent / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    networks = ["--inception", "none", "--vgg16", "none", "--features", folder / "standin/export"]
    files = ["--images", folder / "set", "--manifest", out.parent / "pairs.jsonl", "--out", out]
    return ["reconstruction", *files, *networks]


@pytest.mark.parametrize(
    ("command_line", "network", "kept"),
    [
        (generation, (RepresentationFeatures, "__call__"), "*.f32"),
        (reconstruction, (reconstruction_suite.PairScores, "__call__"), "*.f64"),
    ],
)
def test_a_killed_evaluation_goes_on_to_the_same_bytes(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command_line: Callable[[Path, Path], list[object]],
    network: tuple[type, str],
    kept: str,
) -> None:
    run(monkeypatch, *command_line(folder, tmp_path / "whole"))
    monkeypatch.setattr(feature_files, "SHARD_IMAGES", 64)
    plain = getattr(*network)

    def slow(self: object, images: object) -> torch.Tensor:
        time.sleep(0.2)
        found: torch.Tensor = plain(self, images)
        return found

    def child() -> None:
        monkeypatch.setattr(*network, slow)
        run(monkeypatch, *command_line(folder, tmp_path / "killed"))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    while not any(path.stat().st_size for path in (tmp_path / "killed").rglob(kept)):
        assert process.is_alive(), "it ended before it was killed, see its output"
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert not (tmp_path / "killed/scores.json").exists()
    run(monkeypatch, *command_line(folder, tmp_path / "killed"))
    for name in ("scores.json", "per_item.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_missing_images_are_refused_or_marked(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = (folder / "set/manifest.jsonl").read_text().splitlines()[:5]
    rows.append(json.dumps({"key": "x", "images": {"result": "absent.png"}, "meta": {}}))
    (tmp_path / "list.jsonl").write_text("\n".join(rows) + "\n")
    arguments = [*generation(folder, tmp_path / "out"), "--manifest", tmp_path / "list.jsonl"]
    with pytest.raises(UserError, match=r"1 of 6 items lack an image .*'x'"):
        run(monkeypatch, *arguments)
    with pytest.raises(UserError, match="num_steps: for drawing; give --run"):
        run(monkeypatch, *arguments, "--steps", 3)
    run(monkeypatch, *arguments, "--allow-partial")
    scores = json.loads((tmp_path / "out/scores.json").read_text())
    assert scores["partial"] and (scores["n"], scores["n_failed"]) == (5, 1)


def test_samples_in_an_npz_file_become_an_image_set(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = generation(folder, tmp_path / "out")
    arguments[2] = folder / "real.npz"
    run(monkeypatch, *arguments)
    scores = json.loads((tmp_path / "out/scores.json").read_text())["scores"]
    assert scores["feature_distance"]["mean"] == pytest.approx(0, abs=1e-9)  # the reference itself
    assert scores["precision_features"]["mean"] == 1
    stored = np.array(Image.open(tmp_path / "out/images/000003.png"))
    assert np.array_equal(stored, np.load(folder / "real.npz")["arr_0"][3])
    np.savez(tmp_path / "other.npz", arr_0=np.zeros((3, 8, 8, 3), np.uint8))
    arguments[2] = tmp_path / "other.npz"
    with pytest.raises(UserError, match="holds the images of another file"):
        run(monkeypatch, *arguments)


def write_scores(
    path: Path, suite: str, scores: dict[str, float], groups: dict[str, float], **other: Any
) -> None:
    def entry(value: float) -> dict[str, Any]:
        return {"mean": value, "low": value - 0.01, "high": value + 0.01, "n": 10}

    tree = {
        "suite": suite,
        "images": "images",
        "n": 10,
        "n_failed": 0,
        "partial": False,
        "seed": 0,
        "scores": {name: entry(value) for name, value in scores.items()},
        "groups": {name: {"correct": entry(value)} for name, value in groups.items()},
        "protocol": {"detector": {"network": "<tiny>"}},
        "fingerprints": {"detector": "abc"},
        "versions": {"torch": "2"},
        **other,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))
    (path.parent / "per_item.jsonl").touch()


def test_calibration_says_which_numbers_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adm = {"fid": 3.941, "sfid": 6.13, "inception_score": 215.6, "precision": 0.826, "recall": 0.531}
    write_scores(tmp_path / "good/scores.json", "generation", adm, {})
    run(monkeypatch, "calibrate", "adm", "--scores", tmp_path / "good/scores.json")
    assert "calibrated: all 5 numbers agree" in capsys.readouterr().out
    write_scores(tmp_path / "bad/scores.json", "generation", {**adm, "fid": 4.2}, {})
    with pytest.raises(UserError, match="1 of 5 numbers differ"):
        run(monkeypatch, "calibrate", "adm", "--scores", tmp_path / "bad/scores.json")
    assert "fid: 4.2, expected 3.943 +- 0.01: DIFFERS" in capsys.readouterr().out
    with pytest.raises(UserError, match="set of 'geneval'"):
        run(monkeypatch, "calibrate", "sdxl", "--scores", tmp_path / "good/scores.json")
    write_scores(tmp_path / "partial/scores.json", "generation", adm, {}, partial=True)
    with pytest.raises(UserError, match="scores are partial"):
        run(monkeypatch, "calibrate", "adm", "--scores", tmp_path / "partial/scores.json")


def test_a_known_set_is_scored_and_compared_in_one_command(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The set and the network of this test stand for ADM's; the published numbers are not theirs."""
    options = [*generation(folder, tmp_path / "out"), "--calibrate", "adm"]
    with pytest.raises(UserError, match=r"5 of 5 numbers differ: trust no score of 'generation'"):
        run(monkeypatch, *options)
    assert "fid: not measured, expected 3.943" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/scores.json").read_text())["scores"]["feature_distance"]["mean"]
    expected = (calibration.Expected("feature_distance", found + 0.004, 0.005),)
    adm = dataclasses.replace(calibration.known("adm"), expected=expected)
    monkeypatch.setattr(calibration, "KNOWN", (adm,))
    run(monkeypatch, *options)
    assert "calibrated: all 1 numbers agree" in capsys.readouterr().out


def test_the_report_sets_runs_beside_the_paper_and_shows_what_failed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(monkeypatch, *generation(folder, tmp_path / "first/generation"))
    tasks = {"single_object": 0.9, "colors": 0.5}
    write_scores(
        tmp_path / "first/geneval/scores.json", "geneval", {"geneval_rewritten": 0.71, "correct": 0.7}, tasks
    )
    write_scores(
        tmp_path / "second/dpg/scores.json", "dpg", {"dpg_qwen3vl": 81.23, "dpg_qwen3vl_entity": 90}, {}
    )
    where = ("--images", folder, "--out", tmp_path / "page.html")
    run(monkeypatch, "report", tmp_path / "first", tmp_path / "second", *where)
    page = (tmp_path / "page.html").read_text()
    assert "Table 4, GenEval" in page and "0.71<br>" in page and "RPiAE + DDT head" in page
    assert "second, DPG is dpg_qwen3vl" in page and "81.23" in page
    assert "Table 3" not in page.partition("Every score")[0].replace(
        "Tables 3", ""
    )  # none of its numbers is there
    assert "&lt;thing" in page and "<thing" not in page and "data:image/png;base64," in page
    first = read_run(tmp_path / "first", [folder])
    (evaluation,) = [one for one in first.evaluations if one.scores["suite"] == "generation"]
    failed = [item.key for item in failed_items(evaluation)]
    lines = evaluation.per_item.values()
    assert failed == [line["key"] for line in lines if not line["values"]["precision_features"]] != []
    assert page.count("data:image/png") == min(len(failed), 60)
    run(monkeypatch, "report", tmp_path / "first", *where, "--max-failed", 2)
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 2 and f"{len(failed)} of 130 items, the first 2 shown" in page
    with pytest.raises(UserError, match=r"no scores\.json in or below"):
        run(monkeypatch, "report", tmp_path / "empty", "--out", tmp_path / "page.html")


def test_scores_of_plain_prompts_do_not_stand_in_the_table_of_rewritten_ones(tmp_path: Path) -> None:
    write_scores(tmp_path / "run/geneval/scores.json", "geneval", {"geneval": 0.6}, {"colors": 0.7})
    assert "Table 4" not in page([read_run(tmp_path / "run")])
    write_scores(tmp_path / "run/other/scores.json", "geneval", {"geneval_rewritten": 0.61}, {"colors": 0.71})
    html = page([read_run(tmp_path / "run")])
    assert "Table 4" in html and "0.71<br>" in html and "0.70<br>" not in html


def test_runs_are_compared_item_by_item(tmp_path: Path) -> None:
    rights = {"first": "110010", "second": "100001"}
    for name, marks in rights.items():
        write_scores(tmp_path / name / "geneval/scores.json", "geneval", {"correct": 0.5}, {})
        lines = [
            {"key": str(key), "values": {"correct": mark == "1", "score": 0.5}, "groups": [], "detail": {}}
            for key, mark in enumerate(marks)
        ]
        lines.append({"key": name, "values": {"correct": True}, "groups": [], "detail": {}})  # of one alone
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "geneval/per_item.jsonl").write_text(text)
    first, second = (read_run(tmp_path / name) for name in rights)
    (found,) = paired(first.evaluations, second.evaluations)
    assert found == Paired("geneval", "correct", both=1, only_first=2, only_second=1, neither=2)
    assert found.p_value == 1.0  # 1 or fewer, or 2 or more, of 3
    assert Paired("s", "m", 0, 0, 6, 0).p_value == pytest.approx(2 / 64)
    assert Paired("s", "m", 3, 0, 0, 3).p_value == 1.0
    html = page([first, second])
    assert "only first</th>" in html and "<td>second</td><td>geneval</td><td>correct</td>" in html


def test_every_row_of_the_papers_tables_is_whole() -> None:
    for table in TABLES:
        assert all(len(values) == len(table.columns) for _, values in table.rows), table.title


def test_prompts_of_benchmarks_can_be_drawn_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = ["item_id", "text", "proposition_id", "dependency", "tuple", "question_natural_language"]
    with (tmp_path / "dpg.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows(
            [columns, ["partiprompts1", "a dog, running", 1, "0", "entity - whole (dog)", "A dog?"]]
        )
    run(monkeypatch, "prompts", "dpg", "--file", tmp_path / "dpg.csv", "--out", tmp_path / "dpg")
    (prompt,) = read_prompts(tmp_path / "dpg/prompts.jsonl")
    assert (prompt.key, prompt.text, prompt.meta["item_id"]) == (
        "partiprompts1",
        "a dog, running",
        "partiprompts1",
    )

    Image.new("RGB", (6, 4), (9, 8, 7)).save(tmp_path / "in.png")
    picture = {"bytes": (tmp_path / "in.png").read_bytes(), "path": None}
    row = {"key": "k1", "task_type": "ps_human", "instruction": "smile", "input_image": picture}
    rows = [{**row, "instruction_language": "en"}, {**row, "key": "k2", "instruction_language": "cn"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "gedit.parquet")
    run(monkeypatch, "prompts", "gedit", "--file", tmp_path / "gedit.parquet", "--out", tmp_path / "gedit")
    (edit,) = read_prompts(tmp_path / "gedit/prompts.jsonl")
    assert (edit.key, edit.text, edit.meta["task_type"]) == ("k1", "smile", "ps_human")
    assert np.array_equal(np.array(Image.open(edit.images[0])), np.array(Image.open(tmp_path / "in.png")))

    edits = {"7": {"id": "in.png", "prompt": "add a hat", "edit_type": "add"}}
    (tmp_path / "edits.json").write_text(json.dumps(edits))
    options = ["prompts", "imgedit", "--file", tmp_path / "edits.json", "--out", tmp_path / "imgedit"]
    run(monkeypatch, *options, "--images", tmp_path)
    (edit,) = read_prompts(tmp_path / "imgedit/prompts.jsonl")
    assert (edit.key, edit.text, edit.meta["edit_type"]) == ("7", "add a hat", "add")
    with pytest.raises(UserError, match="no such file; unpack ImgEdit-Bench"):
        run(monkeypatch, *options, "--images", tmp_path / "absent")


def test_benchmark_files_are_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in FILES.values():
        assert (file.sha256 is None) != (file.git_blob is None)
        assert len(file.sha256 or "") in (0, 64) and len(file.path.split("/")[2]) == 40
    path = tmp_path / "mine.csv"
    path.write_bytes(b"what is up, doc?")
    assert git_blob_hash(path) == "bd9dbf5aae1a3862dd1526723246b20206e5fc37"  # the example in git's own book
    assert obtain("dpg", path) == path
    with pytest.raises(UserError, match="its sha256 is"):
        obtain("dpg", path, "0" * 64)
    with pytest.raises(UserError, match="no such file; give the benchmark's"):
        obtain("dpg", tmp_path / "absent.csv")
    monkeypatch.setattr(benchmark_files, "fetch", lambda *_: path)
    with pytest.raises(UserError, match="its git hash differs"):
        obtain("dpg")
