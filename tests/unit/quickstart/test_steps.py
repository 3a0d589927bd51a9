"""The quickstart's chain: what is done stays done, what failed is done again, what changed is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from base import files
from base.config import UserError
from base.files import read_json
from engine.run_lock import RunLock
from quickstart import ablation, chain_folder, class_chain
from quickstart import chain as quickstart
from quickstart.steps import Step, run_steps


def test_a_failed_chain_continues_at_the_missing_step(tmp_path, capsys) -> None:
    calls = []
    write = [
        sys.executable,
        "-c",
        f"import pathlib, sys; sys.exit(not pathlib.Path({str(tmp_path / 'go')!r}).exists())",
    ]
    steps = [
        Step("first", "is done once", lambda: calls.append("first")),
        Step("second", "needs a file", write),
    ]
    with pytest.raises(UserError, match=r"step 'second' failed \(exit 1\); its log is .*second\.log"):
        run_steps(tmp_path, steps)
    (tmp_path / "go").touch()
    run_steps(tmp_path, steps)
    assert calls == ["first"]
    assert "first: is done once - done" in capsys.readouterr().out
    durations = read_json(tmp_path / "durations.json")
    assert [row["name"] for row in durations] == ["first", "second"]
    assert all(row["seconds"] >= 0 for row in durations)


def test_another_config_for_a_done_step_is_refused_not_mixed_in(tmp_path) -> None:
    config = tmp_path / "a.yaml"
    config.write_text("steps: 1")
    child = tmp_path / "b.yaml"
    child.write_text("extends: a.yaml")
    steps = [Step("train", "reads a config", lambda: None, (str(child),))]
    run_steps(tmp_path / "run", steps)
    config.write_text("steps: 1 # a comment changes nothing")
    run_steps(tmp_path / "run", steps)
    config.write_text("steps: 2")
    with pytest.raises(UserError, match="'train' was done with another config"):
        run_steps(tmp_path / "run", steps)
    run_steps(tmp_path / "other", [Step("score", "has settings", lambda: None, settings={"num_images": 3})])
    with pytest.raises(UserError, match="'score' was done with another config"):
        run_steps(
            tmp_path / "other", [Step("score", "has settings", lambda: None, settings={"num_images": 4})]
        )


def test_output_of_a_step_is_logged_whole_and_shown_without_noise(tmp_path, capsys) -> None:
    print_two = "print('[2026-01-01 00:00:00] [INFO] noise'); print('[pivot] step 1')"
    run_steps(tmp_path, [Step("speaks", "prints", [sys.executable, "-c", print_two])])
    shown = capsys.readouterr().out
    assert "[pivot] step 1" in shown and "noise" not in shown
    assert "noise" in (tmp_path / "logs" / "speaks.log").read_text()


@pytest.mark.parametrize("command", [class_chain, ablation])
def test_a_further_chain_does_the_quickstarts_steps_it_needs_and_then_its_own(
    command, tmp_path, monkeypatch, capsys
) -> None:
    ran = []
    monkeypatch.setattr(quickstart, "run_steps", lambda root, steps: ran.append((root, steps)))
    monkeypatch.setattr(command, "identity_of", lambda base, name: f"{name} of {base}")
    old = tmp_path / "old"
    chain_folder.claim(tmp_path, command.CONFIGS.rpartition("/")[2])
    with chain_folder.recorded(tmp_path, "scores"):
        old.touch()

    def call(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["command", *arguments, f"root={tmp_path}"])
        command.main()

    call("--dry-run", "--fresh")
    assert not ran and "num_ranks: 2" in capsys.readouterr().out
    call()
    (base, needed), (root, own) = ran
    assert (str(base), root) == ("runs/quickstart", tmp_path) and old.exists()
    assert needed[0].name == "data" and needed[-1].name == command.LAST_OF_BASE
    assert own[-1].name == "scores" and f"{command.LAST_OF_BASE} of {base}" in {
        step.settings for step in own[:-1]
    }
    assert "results: docs/results/" in capsys.readouterr().out
    call("--fresh")
    assert not old.exists()


def test_fresh_removes_what_the_chain_wrote_and_no_file_of_another(tmp_path) -> None:
    root = tmp_path / "root"

    def write(path: str) -> None:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)

    def broken() -> None:
        write("pivot/metrics.jsonl")
        raise UserError("killed")

    def clear() -> None:
        chain_folder.remove(root, "quickstart", ["data", "pivot"])

    clear()  # nothing there
    chain_folder.claim(root, "quickstart")
    with pytest.raises(UserError, match="killed"):
        run_steps(root, [Step("data", "", lambda: write("data/a.tar")), Step("pivot", "", broken)])
    write("data/thesis.txt")
    before = sorted(root.rglob("*"))
    with pytest.raises(
        UserError, match=r"holds data/thesis\.txt, and nothing shows that quickstart wrote it"
    ):
        clear()
    assert sorted(root.rglob("*")) == before
    (root / "data/thesis.txt").rename(tmp_path / "thesis.txt")
    clear()
    assert not any(root.iterdir()) and (tmp_path / "thesis.txt").exists()


def test_fresh_knows_the_files_of_a_step_that_was_killed(tmp_path) -> None:
    (tmp_path / "mine.txt").touch()
    chain_folder.claim(tmp_path, "quickstart")
    kill = f"import os, signal, pathlib; pathlib.Path({str(tmp_path / 'half')!r}).touch(); os.kill(os.getppid(), 9)"
    step = f"Step('data', '', python('-c', {kill!r}))"
    steps = f"from quickstart.steps import *; run_steps(Path({str(tmp_path)!r}), [{step}])"
    assert subprocess.run([sys.executable, "-c", steps]).returncode == -9
    with pytest.raises(UserError, match=r"holds mine\.txt"):
        chain_folder.remove(tmp_path, "quickstart", ["data"])
    (tmp_path / "mine.txt").unlink()
    chain_folder.remove(tmp_path, "quickstart", ["data"])
    assert not any(tmp_path.iterdir())


def test_fresh_is_refused_where_a_training_runs(tmp_path) -> None:
    chain_folder.claim(tmp_path, "quickstart")
    with chain_folder.recorded(tmp_path, "pivot"):
        lock = RunLock.take(tmp_path / "pivot", print)
    try:
        with pytest.raises(UserError, match="another training runs here"):
            chain_folder.remove(tmp_path, "quickstart", ["pivot"])
        assert (tmp_path / "pivot" / ".lock").exists()
    finally:
        lock.release()


@pytest.mark.parametrize("root", ["runs", "runs/quickstart", "runs/quickstart/data"])
def test_a_further_chain_stays_apart_from_the_quickstarts_folder(root, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["command", "--fresh", f"root={root}"])
    with pytest.raises(UserError, match="give a folder apart from it"):
        ablation.main()


def test_fresh_knows_a_chain_of_an_earlier_version_by_its_steps(tmp_path) -> None:
    for folder in ("steps", "logs", "data"):
        (tmp_path / folder).mkdir()
    files.write_json(tmp_path / "steps/data.json", {"identity": "a", "seconds": 1.0, "done": True})
    with pytest.raises(UserError, match="this is something else"):
        chain_folder.remove(tmp_path, "ablation", ["frozen"])
    chain_folder.remove(tmp_path, "quickstart", ["data"])
    assert not any(tmp_path.iterdir())
