"""The class-conditional benchmark runs to its end and has a line for every step count that it is asked for."""

from __future__ import annotations

import re
import sys

import pytest

from benchmarks import class_conditional


def test_every_step_count_has_a_rate_beside_the_plain_reference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--sizes", "tiny", "dh-tiny", "--channels", "4", "--side", "2", "--batch", "2", "--repeats", "1"]
    steps = ["--steps", "2", "3", "--heun-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["class_conditional", *sizes, *steps])
    class_conditional.main()
    line = r"^  (\S.*?) +ours +([\d.]+) images/s, plain +([\d.]+), ratio ([\d.]+)$"
    rows = re.findall(line, capsys.readouterr().out, re.MULTILINE)
    drawings = ["drawing, euler 2", "drawing, euler 3", "drawing, heun 2"]
    assert [name for name, *_ in rows] == ["training step", *drawings] * 2
    assert all(float(rate) > 0 for _, *rates in rows for rate in rates)


def test_step_counts_are_the_papers_unless_others_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(class_conditional, "_compare_drawing", lambda *call: asked.append((call[2], call[3])))
    monkeypatch.setattr(
        sys, "argv", ["class_conditional", "--sizes", "tiny", "--side", "2", "--channels", "4"]
    )
    class_conditional.main()
    assert ("euler", 50) in asked and ("euler", 250) in asked
