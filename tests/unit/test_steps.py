"""The quickstart's chain: what is done stays done, what failed is done again, what changed is refused."""

from __future__ import annotations

import sys

import pytest

from engine.config import UserError
from engine.files import read_json
from launch import ablation, quickstart, quickstart_class
from launch.steps import Step, run_steps


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


@pytest.mark.parametrize("command", [quickstart_class, ablation])
def test_a_further_chain_does_the_quickstarts_steps_it_needs_and_then_its_own(
    command, tmp_path, monkeypatch, capsys
) -> None:
    ran = []
    monkeypatch.setattr(quickstart, "run_steps", lambda root, steps: ran.append((root, steps)))
    monkeypatch.setattr(command, "identity_of", lambda base, name: f"{name} of {base}")
    old = tmp_path / "old"
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
