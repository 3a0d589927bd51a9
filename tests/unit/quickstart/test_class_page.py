"""The class-conditional quickstart: its chain, its suite, and what its page says of the paper's order."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from base.config import load
from base.files import write_json
from data.image_set import ImageSet, Item, write_image, write_manifest
from evaluation.metrics.interval import Estimate
from evaluation.runner import evaluate
from launch.runs.configs import ClassRun, EncodeRun
from quickstart.class_chain import LAST_OF_BASE, QuickstartClassRun, build_steps
from quickstart.class_page import LABELS, Point, Reference, at_equal_time, at_time, charts, page, verdict
from quickstart.judge import Verdict
from quickstart.pictures.scenes import OBJECT_NAMES
from quickstart.suites.class_images import EmojiClassSuite

RIGHT = Estimate(0.5, 0.4, 0.6, 100)


REFERENCES = {name: Reference(0.25, Estimate(0.9, 0.85, 0.95, 100)) for name in LABELS}


def rated(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.1, mean + 0.1, 100)


def point(
    latents: str, distance: float, step: int = 40, seconds: float | None = 8.0, right: Estimate = RIGHT
) -> Point:
    return Point(latents, step, seconds, distance, right)


def page_of(points: list[Point]) -> str:
    images = {"distance": "d.svg"}
    return page(points, REFERENCES, "machine", images, network="width 2", num_images=8, num_real=9)


def rows_of(text: str | list[str]) -> list[list[str]]:
    lines = text.splitlines() if isinstance(text, str) else text
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


@pytest.mark.parametrize(
    ("distances", "words"),
    [
        ((1.0, 2.0, 3.0), ["RPiAE before RAE appears", "RPiAE before VAE appears", "RAE before VAE appears"]),
        (
            (3.0, 2.0, 2.01),
            ["RPiAE before RAE does not appear", "RAE before VAE cannot be told (less than 2%"],
        ),
    ],
)
def test_the_order_is_judged_pair_by_pair(distances: tuple[float, ...], words: list[str]) -> None:
    points = {name: point(name, d) for name, d in zip(LABELS, distances, strict=True)}
    by_distance, by_right = verdict(points, "there").split("By class right: ")
    assert all(word in by_distance for word in words), by_distance
    assert by_right.count("cannot be told (intervals overlap)") == 3


def test_class_right_is_judged_by_its_intervals() -> None:
    rights = zip(LABELS, (0.2, 0.5, 0.65), strict=True)
    text = verdict({name: point(name, 1.0, right=rated(mean)) for name, mean in rights}, "there")
    assert "RPiAE before RAE does not appear" in text.split("By class right")[1]
    assert "RAE before VAE cannot be told (intervals overlap)" in text


def test_the_page_has_a_column_for_every_step_and_its_marks() -> None:
    points = [point(name, 1.5, step, step / 5) for name in LABELS for step in (20, 40)]
    text = page_of(points[:-2] + points[-1:])  # an export that is gone leaves a gap
    rows = rows_of(text)
    assert ["distance", "step 20", "step 40", "reconstructions"] in rows
    assert ["RPiAE", "1.50", "1.50", "0.25"] in rows and ["VAE", "-", "1.50", "0.25"] in rows
    right = "0.500 (0.400-0.600)"
    assert ["RAE", right, right, "0.900 (0.850-0.950)"] in rows
    assert ["RAE", "4", "8"] in rows
    assert "](d.svg)" in text and "The paper's order at the last step" in text


def test_equal_time_is_when_the_fastest_training_was_done() -> None:
    points = [
        *(point("rpiae", distance, step, 10.0 * step) for step, distance in ((1, 9.0), (3, 3.0))),
        *(point("rae", distance, step, 8.0 * step) for step, distance in ((1, 8.0), (3, 4.0))),
        *(point("vae", distance, step, 9.0 * step) for step, distance in ((1, 20.0), (3, 2.0))),
    ]
    text = at_equal_time(points)
    assert text[0].startswith("After 24 s, when RAE had done its 3 steps.")
    cells = {row[0]: row[2:5] for row in rows_of(text)}
    assert cells["RAE"] == ["3", "8000", "4.00"]
    assert cells["RPiAE"] == ["2", "10000", "4.80"]  # 9 - 6 * (24 - 10) / (30 - 10)
    assert cells["VAE"] == ["3", "9000", "5.00"]  # 20 - 18 * (24 - 9) / (27 - 9)
    assert "RPiAE before RAE does not appear" in text[-1] and "RPiAE before VAE appears" in text[-1]
    assert "RPiAE before VAE does not appear" in page_of(points), "the last steps are judged as well"


def test_intervals_are_interpolated_too_and_nothing_is_extrapolated() -> None:
    run = [point("rae", 2.0, 10, 4.0, rated(0.2)), point("rae", 4.0, 30, 8.0, rated(0.6))]
    found = at_time([4.0, 8.0], run, 5.0)
    assert found is not None and (found.step, found.seconds, found.distance) == (15, 5.0, 2.5)
    right = found.class_right
    assert (right.mean, right.low, right.high, right.n) == pytest.approx((0.3, 0.2, 0.4, 100))
    assert at_time([4.0, 8.0], run, 3.9) is None and at_time([4.0, 8.0], run, 8.1) is None


def test_a_training_without_times_is_left_out_by_name() -> None:
    points = [point("rpiae", 1.0), point("rae", 2.0), point("vae", 3.0, seconds=None)]
    text = "\n".join(at_equal_time(points))
    assert "Left out: VAE." in text and "before VAE" not in text and "RPiAE before RAE appears" in text
    assert ["VAE", "-"] in rows_of(page_of(points)) and "before VAE" in page_of(points)
    assert "no two trainings" in at_equal_time(points[1:])[-1]
    nothing = [point(name, 1.0, seconds=None) for name in LABELS]
    assert "Left out: RPiAE, RAE, VAE." in page_of(nothing) and charts(nothing, REFERENCES) == {}


def test_a_training_without_an_export_when_the_fastest_was_done_is_left_out() -> None:
    slow = [point("vae", 1.0, 20, 100.0), point("vae", 1.0, 40, 200.0)]
    text = "\n".join(at_equal_time([point("rpiae", 1.0), point("rae", 2.0), *slow]))
    assert "Left out: VAE." in text and "RPiAE before RAE appears" in text


def test_curves_are_files_that_need_no_page() -> None:
    points = [point(name, 5.0 - step / 10, step, 2.0 * step) for name in LABELS for step in (10, 20, 40)]
    for svg in charts(points, REFERENCES).values():
        root = ElementTree.fromstring(svg)  # noqa: S314  # made just now
        assert root.tag == "{http://www.w3.org/2000/svg}svg" and "var(" not in svg and "prefers" not in svg
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        assert {"RPiAE", "RAE", "VAE", "20", "40", "60", "80"} <= set(texts)
        curves = re.findall(r'<path d="M ([^"z]*)" style="fill: none; stroke: #\w+; stroke-width: 1.6', svg)
        lefts = [float(place.split()[0]) for place in curves[0].split("L")]
        assert (lefts[2] - lefts[0]) / (lefts[1] - lefts[0]) == pytest.approx(
            3, rel=0.01
        )  # seconds 20, 40, 80
        assert svg.count("stroke-dasharray") == 3 and len(curves) == 6, "three curves, and the legend's lines"
        assert svg.count("<use") == 9 + 3
        assert 'L 0 0 \nz\n" style="fill: #ffffff"' in svg


class Features:
    """The mean colour."""

    name, fingerprint, dim, protocol = "colour", "colour", 3, {"network": "none"}

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean((2, 3)) / 255


class RedIsApple:
    """A judge that sees the first class in every image that is more red than blue."""

    fingerprint = "judge"

    def __call__(self, pixels: Tensor) -> list[Verdict]:
        seen = [0 if image[0].float().mean() > image[2].float().mean() else 1 for image in pixels]
        return [
            Verdict((OBJECT_NAMES[i],), {n: float(n == OBJECT_NAMES[i]) for n in OBJECT_NAMES}, {}, "")
            for i in seen
        ]


def colours(folder: Path, reds: list[int], labels: list[int]) -> ImageSet:
    items = []
    for index, (red, label) in enumerate(zip(reds, labels, strict=True)):
        image = torch.tensor([red, 0, 255 - red], dtype=torch.uint8)[:, None, None].expand(3, 4, 4)
        write_image(folder / f"{index}.png", image.contiguous())
        items.append(Item(str(index), {"result": f"{index}.png"}, {"label": label}))
    write_manifest(folder, items)
    return ImageSet.open(folder)


def test_the_suite_counts_right_classes_and_measures_the_whole_set(tmp_path: Path) -> None:
    real = colours(tmp_path / "real", [250, 0, 240, 10], [0, 1, 0, 1])
    colours(tmp_path / "drawn", [250, 0, 240, 10], [0, 0, 0, 1])
    suite = EmojiClassSuite(RedIsApple(), Features(), real)  # type: ignore[arg-type]
    scores = evaluate(suite, tmp_path / "drawn", tmp_path / "out")["scores"]
    assert scores["class_right"]["mean"] == scores["class_best"]["mean"] == 0.75
    assert scores["feature_distance"]["mean"] == pytest.approx(0, abs=1e-6)  # the same images
    colours(tmp_path / "other", [255, 250, 255, 250], [0, 0, 0, 0])
    other = evaluate(suite, tmp_path / "other", tmp_path / "out2")["scores"]
    assert other["feature_distance"]["mean"] > 0.1


def test_every_training_of_the_chain_reads_its_config_and_what_it_reads_is_written_before(
    tmp_path: Path,
) -> None:
    run = load(QuickstartClassRun, "configs/quickstart_class/run.yaml")
    write_json(tmp_path / "steps" / f"{LAST_OF_BASE}.json", {"identity": "base"})
    steps = build_steps(run, Path(run.root), tmp_path)
    assert [step.name for step in steps][-1] == "scores" and len(steps) == 4 + 2 * len(LABELS) + 1
    for name in LABELS:
        training = load(ClassRun, f"configs/quickstart_class/{name}.yaml")
        encoding = load(EncodeRun, f"configs/quickstart_class/latents_{name}.yaml")
        assert training.run_dir == f"{run.root}/{name}"
        assert (training.data.shards, training.autoencoder) == (encoding.out, encoding.autoencoder)
        assert encoding.shards == f"{run.root}/data/classes-train" and encoding.text_tokenizer is None
