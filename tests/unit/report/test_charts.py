"""Curves that matplotlib draws: equal bytes everywhere, text as it stands, nothing said and no display asked for."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
import pytest

from base.terminal import printable
from report.charts import Curve, chart_file, curve_chart, line_chart

POINTS = [(float(step), 1.0 / step) for step in range(1, 9)]
DRAWS = """
import sys
from report.charts import Curve, chart_file
from report.watch import page, screen
assert not any(name.split(".")[0] == "matplotlib" for name in sys.modules), "loaded before a chart was drawn"
print(chart_file([Curve("\\u4e2d \\U0001f600", [(1.0, 2.0), (2.0, 3.0)])], "$x_1$"))
assert "matplotlib.pyplot" not in sys.modules
"""


def test_equal_charts_are_equal_bytes_under_any_settings_of_a_person() -> None:
    before = curve_chart([Curve("a", POINTS)], "loss"), chart_file([Curve("a", POINTS)], "loss")
    with matplotlib.rc_context({"savefig.bbox": "tight", "path.sketch": (1, 100, 2), "font.size": 30}):
        assert (curve_chart([Curve("a", POINTS)], "loss"), chart_file([Curve("a", POINTS)], "loss")) == before
    assert "<dc:date>" not in before[1]


@pytest.mark.parametrize("text", ["$x_1$ \\frac{", "_hidden", "a < b & c", "bell\a\x00", "\ud83d"])
def test_names_stand_in_a_file_as_they_are_and_leave_it_whole(text: str) -> None:
    root = ElementTree.fromstring(chart_file([Curve(text, POINTS)], text))  # noqa: S314  # made just now
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert texts.count(printable(text)) == 2


@pytest.mark.parametrize("value", [1e-300, -1e300, 5e-324])
def test_extreme_values_are_drawn_inside_the_chart(value: float) -> None:
    drawn = line_chart([(1.0, 0.0), (1.0, value), (1e300, value)], "loss")
    assert "nan" not in drawn and "inf" not in drawn


def test_matplotlib_is_loaded_late_and_says_nothing(tmp_path: Path) -> None:
    nowhere = {
        "HOME": "/proc/none",
        "MPLCONFIGDIR": "/proc/none",
        "MPLBACKEND": "TkAgg",
        "TMPDIR": str(tmp_path),
    }
    environment = {**os.environ, **nowhere}
    environment.pop("DISPLAY", None)
    done = subprocess.run(
        [sys.executable, "-c", DRAWS], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == "" and "$x_1$" in done.stdout and "\u4e2d \U0001f600" in done.stdout
