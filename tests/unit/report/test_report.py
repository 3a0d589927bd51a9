"""What the report says, and that it can be made at any moment of a run."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from base import files
from data.image_set import Item, write_image, write_manifest
from report import render_report
from report.charts import bar_chart, line_chart, short
from report.run_contents import Training, read_training


def estimate(value: float, n: int = 40) -> dict[str, Any]:
    return {"mean": value, "low": value - 0.05, "high": value + 0.05, "n": n}


def write_evaluation(root: Path, name: str, metrics: dict[str, float], lines: list[dict[str, Any]]) -> None:
    scores = {
        "suite": name,
        "images": f"../images/{name}",
        "n": len(lines),
        "n_failed": 0,
        "partial": False,
        "scores": {metric: estimate(value) for metric, value in metrics.items()},
        "groups": {},
    }
    files.write_json(root / "evaluation" / name / "scores.json", scores)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    files.write_text(root / "evaluation" / name / "per_item.jsonl", text)


def write_t2i(root: Path, caption: str, object_right: bool = True) -> None:
    directory = root / "evaluation/images/t2i"
    write_image(directory / "0.png", torch.zeros(3, 16, 16, dtype=torch.uint8))
    write_manifest(directory, [Item("0", {"result": "0.png"}, {"caption": caption})])
    values = {"object_right": object_right, "background_right": True, "relation_right": None}
    detail = {"seen": {"cat": 0.9}, "background": "red"}
    line = {"key": "0", "values": values, "groups": ["single"], "detail": detail}
    write_evaluation(root, "t2i", {"object_right": 0.85, "background_right": 0.80}, [line])


def targets(root: Path) -> dict[str, dict[str, Any]]:
    found = files.read_json(root / "report.json")["targets"]
    return {target["label"]: target for target in found}


def test_an_empty_run_says_plainly_what_is_missing(tmp_path: Path) -> None:
    html = render_report(tmp_path).read_text()
    assert html.count("No images yet.") == 3
    assert "Nothing was judged yet." in html and "No training has logged" in html
    assert all(target["passed"] is None for target in targets(tmp_path).values())
    assert html.count("not yet") == 7 and "falls short" not in html


def test_each_target_is_compared_with_its_own_number(tmp_path: Path) -> None:
    write_t2i(tmp_path, "a dog")
    html = render_report(tmp_path).read_text()
    found = targets(tmp_path)
    objects = found["Text-to-image, held-out captions: objects right"]
    background = found["Text-to-image, held-out captions: background right"]
    assert (objects["value"], objects["asked"], objects["passed"]) == (0.85, 0.80, True)
    assert (background["value"], background["asked"], background["passed"]) == (0.80, 0.90, False)
    assert html.count("✓ reached") == 1 and html.count("✗ falls short") == 1


@pytest.mark.parametrize(("minutes", "passed"), [(24.9, True), (25.1, False)])
def test_time_is_an_upper_bound(tmp_path: Path, minutes: float, passed: bool) -> None:
    half = minutes * 30
    files.write_json(
        tmp_path / "durations.json",
        [{"name": "data", "seconds": half}, {"name": "pivot", "seconds": half}],
    )
    render_report(tmp_path)
    assert targets(tmp_path)["Everything together, installation apart"]["passed"] is passed


def test_a_wrong_drawing_shows_what_the_judge_saw(tmp_path: Path) -> None:
    write_t2i(tmp_path, "a dog", object_right=False)
    html = render_report(tmp_path).read_text()
    assert "✗ objects" in html and "judge sees: cat on red" in html


def test_text_from_data_cannot_break_the_page(tmp_path: Path) -> None:
    write_t2i(tmp_path, "<script>alert('dog & cat')</script>")
    files.write_json(tmp_path / "notes.json", ["1 < 2"])
    html = render_report(tmp_path).read_text()
    assert "<script" not in html and "&lt;script&gt;" in html and "1 &lt; 2" in html


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_t2i(tmp_path, "a dog")
    html = render_report(tmp_path).read_text()
    assert "data:image/png;base64," in html
    assert not re.search(r'(src|href)="(?!data:|https://creativecommons)', html)
    assert "<link" not in html and "@import" not in html and "url(" not in html


def test_a_torn_last_line_of_a_running_training_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "pivot").mkdir()
    whole = [json.dumps({"step": step, "loss": 1.0 / step}) for step in (1, 2, 3)]
    (tmp_path / "pivot/metrics.jsonl").write_text("\n".join([*whole, '{"step": 4, "lo']))
    render_report(tmp_path)
    assert files.read_json(tmp_path / "report.json")["trainings"]["pivot"]["step"] == 3


def test_a_non_finite_loss_leaves_a_gap_and_no_error(tmp_path: Path) -> None:
    (tmp_path / "t2i").mkdir()
    rows = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}]
    (tmp_path / "t2i/metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "loss of t2i" in render_report(tmp_path).read_text()


def training_of(*lines: tuple[int, float | None]) -> Training:
    return Training("t", tuple({"step": step, "step_s": step_s} for step, step_s in lines))


def test_training_seconds_are_the_sum_of_the_steps() -> None:
    training = training_of((100, 0.5), (200, 0.1))
    seconds = [training.seconds_at(step) for step in (0, 50, 100, 150, 200)]
    assert seconds == pytest.approx([0.0, 25.0, 50.0, 55.0, 60.0])


def test_training_seconds_after_what_was_logged_are_unknown() -> None:
    assert training_of((100, 0.5)).seconds_at(101) is None
    assert training_of((100, 0.5), (200, None)).seconds_at(200) is None
    assert training_of().seconds_at(1) is None
    assert Training("t", ({"step": 100, "loss": 1.0},)).seconds_at(100) is None


def test_a_line_without_pace_and_steps_before_a_resume_count_with_the_next_mean() -> None:
    assert training_of((100, None), (200, 0.25)).seconds_at(200) == pytest.approx(50)
    # Stopped at step 137 and resumed: the next line's mean is of steps 138 to 200.
    assert training_of((100, 0.5), (200, 0.25)).seconds_at(137) == pytest.approx(50 + 37 * 0.25)


def test_a_training_that_logged_nothing_has_no_rows(tmp_path: Path) -> None:
    assert read_training(tmp_path / "gone") == Training("gone", ())
    files.write_text(tmp_path / "t/metrics.jsonl", '{"step": 4, "step_s": 0.5}\n{"step": 8, "st')
    assert read_training(tmp_path / "t").seconds_at(4) == pytest.approx(2)


def test_trainings_stand_in_the_order_they_ran(tmp_path: Path) -> None:
    for name in ("bridge", "pivot", "t2i"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    files.write_json(
        tmp_path / "durations.json", [{"name": name, "seconds": 1.0} for name in ("pivot", "bridge", "t2i")]
    )
    html = render_report(tmp_path).read_text()
    places = [html.index(f"loss of {name}") for name in ("pivot", "bridge", "t2i")]
    assert places == sorted(places)


def test_images_that_are_gone_do_not_take_the_scores_with_them(tmp_path: Path) -> None:
    write_t2i(tmp_path, "a dog")
    (tmp_path / "evaluation/images/t2i/manifest.jsonl").unlink()
    html = render_report(tmp_path).read_text()
    assert "<img" not in html and "✓ reached" in html


def curve_of(svg: str) -> list[tuple[float, float]]:
    (text,) = re.findall(r'<path d="M ([^"]*)" style="fill: none; stroke: var\(--accent\)', svg)
    return [(float(x), float(y)) for x, y in (pair.split() for pair in text.split("L"))]


def test_a_curve_goes_down_the_page_as_the_loss_falls_and_stays_inside() -> None:
    curve = curve_of(line_chart([(step, 1.0 / step) for step in range(1, 2000)], "loss"))
    assert len(curve) <= 402  # thinned
    assert all(x1 <= x2 and y1 <= y2 for (x1, y1), (x2, y2) in itertools.pairwise(curve))
    assert min(y for _, y in curve) >= 0 and max(y for _, y in curve) <= 180


@pytest.mark.parametrize("points", [[(5.0, 0.3)], [(0.0, 0.0), (1.0, 0.0)], [(0.0, -1.0), (10.0, 4.0)]])
def test_charts_take_single_equal_and_negative_values(points: list[tuple[float, float]]) -> None:
    assert curve_of(line_chart(points, "loss"))
    assert "nan" not in line_chart(points, "loss") + bar_chart([("a", 0.0, "0 s")], "time")


def test_numbers_are_short_and_keep_their_size() -> None:
    assert [short(value) for value in (0.01234, 3.0, 15_300.0, 1234.5)] == [
        "0.0123",
        "3",
        "15.3k",
        "1234",
    ]
