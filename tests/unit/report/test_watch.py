"""What `watch` shows of a run folder, whatever state it is in. Folders are written by the run's own log."""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from base import files
from base.config import UserError
from engine.logs import RunLog
from launch import watch
from launch.runs import entry
from report.charts import smoothed, thinned
from report.run_contents import Training
from report.watch import page, read_run, screen
from report.watch.run import unit_of
from report.watch.terminal import picture

CONFIG = {
    "run_dir": "x",
    "engine": {"steps": 100, "optimizer": {"lr": 0.001}},
    "data": {"shards": "<script>"},
}
CURVE = "stroke: var(--accent); stroke-width: 1.6"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


def write_run(path: Path, lr: float = 0.001, steps: int = 50) -> Path:
    """A loss that falls from 1 to 0, a line every second until now, one roll-back and one sample grid."""
    path.mkdir()
    config = {**CONFIG, "engine": {"steps": 100, "optimizer": {"lr": lr}}}
    files.write_json(path / "config.json", config)
    log = RunLog(path, "t2i", config, 0, "disabled")
    log.event("start", 0, "100 steps on cpu")
    for step in range(1, steps + 1):
        values = {
            "step": step,
            "loss": 1 - step / 100,
            "lr": lr,
            "grad_norm": 1.0,
            "samples": 4.0,
            "samples/a": 3.0,
        }
        values |= {
            "samples/b": 1.0,
            "data_share": 0.25,
            "forward_share": 0.5,
            "memory_gib": 2.0,
            "tokens": 9.0,
        }
        log.metrics({**values, "samples_per_s": 4.0, "system/disk_free_gib": 30.0}, 100, 60.0)
    log.event("checkpoint", 40, "saved step 40 in 0.1 s")
    log.event("roll_back", 45, "rolled back from step 45 to step 40: <b>the loss exploded</b>")
    log.samples(40, np.full((8, 16, 3), 200, np.uint8))
    log.close()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    now_s = time.time()
    for row in rows:
        row["time_s"] = now_s - (steps - row["step"])
    files.write_text(path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_run_is_alive_while_it_writes(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "t2i"))
    assert run.state(time.time()) == "running" and run.state(time.time() + 59) == "running"
    assert run.state(time.time() + 70) == "silent"
    assert (run.step, run.num_steps) == (50, 100)
    assert run.eta_s() == pytest.approx(50, rel=1e-3)  # a step a second


def test_a_slow_run_is_given_more_time(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "t2i")
    rows = [{"step": 10 * k, "loss": 1.0, "time_s": 1e9 + 300 * k} for k in range(1, 6)]
    files.write_text(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    (run_dir / "events.jsonl").unlink()
    run = read_run(run_dir)
    long = ({"step": 1.0, "time_s": 1e9}, {"step": 2.0, "time_s": 1e9 + 9000})
    assert unit_of([run], "time") == "minutes" and unit_of([run], "step") == "step"
    assert unit_of([dataclasses.replace(run, changed_s=0, training=Training("x", long))], "time") == "hours"
    assert run.state(1e9 + 1500 + 1700) == "running" and run.state(1e9 + 1500 + 1900) == "silent"


@pytest.mark.parametrize(
    ("kind", "state"), [("finish", "finished"), ("stop", "stopped"), ("error", "stopped")]
)
def test_the_last_event_says_how_a_run_ended(tmp_path: Path, kind: str, state: str) -> None:
    run_dir = write_run(tmp_path / "t2i")
    line = {"time_s": time.time(), "step": 50, "kind": kind, "text": "the end"}
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    assert read_run(run_dir).state(time.time() + 1e6) == state


def test_half_lines_nulls_and_absent_files_are_taken_as_they_are(tmp_path: Path) -> None:
    run_dir = tmp_path / "old"
    run_dir.mkdir()
    rows = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "loss": 1.0},
        {"step": 4, "loss": None},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo'
    (run_dir / "metrics.jsonl").write_text(text)
    run = read_run(run_dir)
    assert run.series("loss", "step") == [(1, 2.0), (3, 1.0)] and run.step == 4
    assert "step 4" in screen([run], ["loss", "psnr"], width=80, height=30, now_s=time.time())
    assert CURVE in page([run], now_s=time.time())
    assert "No times were logged" in page([run], now_s=time.time(), over="time")


def test_a_run_that_has_only_started_can_be_watched(tmp_path: Path) -> None:
    log = RunLog(tmp_path, "t2i", {}, 0, "disabled")
    log.event("start", 0, "100 steps")
    log.close()
    run = read_run(tmp_path)
    assert run.state(time.time()) == "waiting"
    assert "loss: not logged" in screen([run], ["loss"], width=80, height=30, now_s=time.time())
    assert "Nothing logged yet." in page([run], now_s=time.time())


def test_a_folder_that_is_no_run_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(tmp_path / "t2i")
    (tmp_path / "junk").mkdir()
    (tmp_path / "junk" / "metrics.jsonl").write_text("\x00\n<html>\n")
    for name, sentence in (
        ("", "runs inside it: junk, t2i"),
        ("none", "no such folder"),
        ("junk", "not what a training"),
    ):
        monkeypatch.setattr(sys, "argv", ["watch", str(tmp_path / name), "--once"])
        capsys.readouterr()
        assert entry.run(watch.main) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and sentence in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", "{"),
        ("config.json", "[1]"),
        ("events.jsonl", '{"time_s": "soon", "step": 1, "kind": "start", "text": ""}\n'),
        ("events.jsonl", '{"step": Infinity, "time_s": 1, "kind": "start", "text": ""}\n'),
        ("metrics.jsonl", "[1]\n"),
        ("metrics.jsonl", "\xff\n{}\n"),
    ],
)
def test_a_file_that_no_run_wrote_is_named(tmp_path: Path, name: str, content: str) -> None:
    run_dir = write_run(tmp_path / "t2i")
    (run_dir / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}: is not what a training writes"):
        read_run(run_dir)


@pytest.mark.parametrize("width", [40, 80, 200])
@pytest.mark.parametrize("colours", [False, True])
def test_the_screen_fits_the_terminal(tmp_path: Path, width: int, colours: bool) -> None:
    runs = [read_run(write_run(tmp_path / name), name) for name in ("a", "b" * 60)]
    text = screen(runs, ["loss", "lr"], width=width, height=30, now_s=time.time(), colours=colours)
    assert ("\x1b" in text) == colours
    lines = [ANSI.sub("", line) for line in text.splitlines()]
    assert max(len(line) for line in lines if "samples /" not in line) <= width  # a path stays whole


def test_a_falling_loss_goes_from_the_upper_left_to_the_lower_right(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "t2i"))
    lines = screen([run], ["loss"], width=60, height=30, now_s=time.time()).splitlines()
    rows = [line.partition("┤")[2] for line in lines if "┤" in line]
    columns = [[k for k, sign in enumerate(row) if "⠁" <= sign <= "⣿"] for row in rows]
    assert all(columns) and columns[0][0] == 0 and columns[-1][-1] == 49
    assert [column[0] for column in columns] == sorted(column[0] for column in columns)


def test_the_screen_says_where_the_time_goes_and_what_went_wrong(tmp_path: Path) -> None:
    text = screen([read_run(write_run(tmp_path / "t2i"))], ["loss"], width=100, height=30, now_s=time.time())
    assert "forward 50%" in text and "data 25%" in text
    assert "rolled back from step 45" in text and "roll-backs 1" in text and "30 GiB free" in text
    assert "samples/step_00000040.png" in text
    bar = next(line for line in text.splitlines() if line.startswith("time "))
    assert bar.count("█") == 47 and bar.count("▓") == 24  # a half and a quarter of 94


def test_samples_are_drawn_in_half_blocks(tmp_path: Path) -> None:
    lines = picture(read_run(write_run(tmp_path / "t2i")).grids[0][1], 80)
    assert len(lines) == 4 and all(line.count("▀") == 16 for line in lines)
    assert "38;2;200;200;200;48;2;200;200;200" in lines[0]


def test_the_page_compares_runs_and_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, lr), name) for name, lr in (("a", 0.001), ("b", 0.002))]
    html = page(runs, now_s=time.time())
    assert "data:image/" in html and "<script" not in html and "&lt;b&gt;the loss exploded" in html
    assert not re.search(r'(src|href)="(?!data:)', html) and "url(" not in html and "@import" not in html
    differing = html.partition("what differs</h2>")[2].partition("</table>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)", differing) == ["engine.optimizer.lr", "0.001", "0.002"]
    wide = html.partition('<figure class="wide">')[2].partition("</svg>")[0]
    assert len(re.findall(r"stroke: var\(--(?:accent|c1)\); stroke-width: 1.6", wide)) == 2
    assert html.count("75.0%, 150 samples") == 2, "of the mixture's sets"


def test_the_page_of_one_run_marks_trouble_and_shows_its_settings(tmp_path: Path) -> None:
    html = page([read_run(write_run(tmp_path / "t2i"))], now_s=time.time(), refresh_s=30)
    assert (
        html.count("stroke: var(--bad)") == html.count("<title>") - 1 == 1
        and "saved step 40" in html
        and "&lt;script&gt;" in html
    )
    assert 'http-equiv="refresh" content="30"' in html


def test_curves_over_time_are_minutes_since_each_runs_first_line(tmp_path: Path) -> None:
    points = read_run(write_run(tmp_path / "t2i")).series("loss", "minutes")
    assert points[0] == (0.0, 0.99)
    assert points[-1] == (pytest.approx(49 / 60), 0.5)


def test_the_command_names_runs_apart_and_writes_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        write_run(tmp_path / folder / "t2i")
    runs = [str(tmp_path / folder / "t2i") for folder in ("first", "second")]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["watch", *runs, "--once", "--curves", "lr", "--over", "time"])
    assert entry.run(watch.main) == 0
    printed = capsys.readouterr().out
    assert "● first/t2i  running" in printed and "● second/t2i  running" in printed and "minutes 0" in printed
    monkeypatch.setattr(sys, "argv", ["watch", *runs, "--html", str(tmp_path / "page.html")])
    assert entry.run(watch.main) == 0
    assert "first/t2i" in (tmp_path / "page.html").read_text()


def test_scores_of_evaluations_have_curves_of_their_own(tmp_path: Path) -> None:
    path = write_run(tmp_path / "class")
    rows = [{"step": step, "time_s": time.time(), "generation/fid": 80.0 - step} for step in (20, 40)]
    (path / "scores.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(path)
    assert run.series("generation/fid", "step") == [(20.0, 60.0), (40.0, 40.0)]
    html = page([run], now_s=time.time())
    assert "<h2>Scores</h2>" in html and "generation fid" in html
    lines = screen([run], ["generation/fid"], width=80, height=24, now_s=time.time())
    assert "generation/fid 40" in lines


def test_thinning_keeps_a_spike_and_smoothing_does_not_lag() -> None:
    points = [(float(k), 1.0) for k in range(5000)]
    points[3333] = (3333.0, 99.0)
    assert (3333.0, 99.0) in thinned(points) and len(thinned(points)) <= 401
    ramp = [(float(k), float(k)) for k in range(100)]
    assert [value for _, value in smoothed(ramp, 7)] == pytest.approx(range(100))


def test_a_strangers_run_folder_cannot_steer_the_terminal_or_break_the_page(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "t2i\x1b[31m")
    event = {
        "time_s": time.time(),
        "step": 50,
        "kind": "alarm",
        "text": "\x1b]0;owned\x07<img src=x onerror=run()>",
    }
    with (run_dir / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    (run_dir / "samples" / "step_00000041.png").write_bytes(b"\x89PNG half copied")
    run = read_run(run_dir)
    text = screen([run], ["loss"], width=80, height=30, now_s=time.time(), samples=True)
    assert "\x1b" not in text and "\x07" not in text and "cannot be read" in text
    html = page([run], now_s=time.time())
    assert "<img src=x" not in html and "cannot be read" in html


def test_shares_steps_and_plans_of_a_stranger_are_drawn_within_the_screen(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "t2i")
    rows = [
        {"step": step, "loss": 1.0, "a_share": 1e12, "b_share": -3.0, "time_s": 1e9} for step in (9, 2, 30, 1)
    ]
    files.write_text(run_dir / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    for steps in ([9], "/dev/zero", float("inf"), -5, {"a": 1}):
        files.write_json(run_dir / "config.json", {"engine": {"steps": steps}})
        run = read_run(run_dir)
        assert run.num_steps is None and run.shares() == {"a": 1.0}
        shown = screen([run], ["loss"], width=80, height=30, now_s=1e9)
        assert max(len(line) for line in shown.splitlines() if "samples" not in line) <= 80
        page([run], now_s=1e9)
