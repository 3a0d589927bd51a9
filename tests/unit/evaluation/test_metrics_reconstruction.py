"""SSIM's boundaries, LPIPS as a score, and the reconstruction suite with scores of items and of the whole set."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base.config import UserError
from data.image_set import Item, write_image, write_manifest
from evaluation.features.interface import FeatureExtractor
from evaluation.metrics.frechet import FeatureStatistics, frechet_distance
from evaluation.metrics.reconstruction import Lpips, ssim, to_uint8
from evaluation.runner import evaluate
from evaluation.suites.reconstruction import ReconstructionSuite
from report import render_report
from tokenizer.training.perceptual import LpipsVgg16


class MeanColour:
    """The mean of every channel."""

    name = "colour"
    fingerprint = "colour-fingerprint"
    protocol: Mapping[str, Any] = {"network": "mean colour"}
    dim = 3

    def __call__(self, pixels: Tensor) -> Tensor:
        return pixels.float().mean(dim=(2, 3))


def noise(num: int, size_px: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (num, 3, size_px, size_px), dtype=torch.uint8, generator=generator)


def make_set(directory: Path, originals: Tensor, results: Tensor) -> Path:
    items = []
    for index, (original, result) in enumerate(zip(originals, results, strict=True)):
        names = {role: f"{index}.{role}.png" for role in ("original", "result")}
        write_image(directory / names["original"], original)
        write_image(directory / names["result"], result)
        items.append(Item(str(index), names, {}))
    write_manifest(directory, items)
    return directory


def test_ssim_of_equal_images_is_one_and_of_inverted_noise_negative() -> None:
    image = noise(2, 24, seed=0)
    assert ssim(image, image).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert float(ssim(255 - image, image).max()) < 0


def test_ssim_of_flat_images_is_the_luminance_term() -> None:
    black, grey = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 51).byte()
    # Means 0 and 0.2, no variance: C1 / (0.2^2 + C1).
    assert ssim(black, grey).item() == pytest.approx(1e-4 / (0.04 + 1e-4), rel=1e-9)


def test_ssim_counts_the_border() -> None:
    image = noise(1, 32, seed=1)
    other = image.clone()
    other[:, :, 0] = 255 - other[:, :, 0]
    assert ssim(other, image).item() < 0.99


def test_ssim_is_of_each_image_by_itself_and_undefined_below_6_px() -> None:
    image, other = noise(3, 16, seed=2), noise(3, 16, seed=3)
    together = ssim(image, other)
    assert [ssim(image[i : i + 1], other[i : i + 1]).item() for i in range(3)] == together.tolist()
    assert math.isnan(ssim(image[:, :, :5, :5], other[:, :, :5, :5])[0].item())


def test_rounding_is_truncation_unless_asked() -> None:
    pixels_01 = torch.tensor([0.9999 / 255, 1.0 / 255, 254.6 / 255, 2.0])
    assert to_uint8(pixels_01).tolist() == [0, 1, 254, 255]
    assert to_uint8(pixels_01, "round").tolist() == [1, 1, 255, 255]


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    torch.manual_seed(0)
    return Lpips(LpipsVgg16())


def test_lpips_scores_8_bit_images_as_the_training_loss_does(lpips: Lpips) -> None:
    torch.manual_seed(0)
    network = LpipsVgg16()
    image, other = noise(2, 32, seed=4), noise(2, 32, seed=5)
    expected = network(image.float() / 255, network.reference(other.float() / 255))
    torch.testing.assert_close(lpips(image, other), expected, rtol=0, atol=0)
    assert lpips(image, image).tolist() == [0.0, 0.0] and len(lpips.fingerprint) == 64


def test_lpips_without_weights_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="VGG16 weights"):
        Lpips.load(str(tmp_path / "absent.pth"))


def test_suite_scores_items_with_intervals_and_the_set_without(tmp_path: Path, lpips: Lpips) -> None:
    originals = noise(40, 16, seed=6)  # more than one call of 32
    results = (originals.float() * 0.9).to(torch.uint8)
    images = make_set(tmp_path / "images", originals, results)
    colour: FeatureExtractor = MeanColour()
    suite = ReconstructionSuite(tmp_path / "store", lpips, {"fd_colour": colour})
    scores = evaluate(suite, images, tmp_path / "out")
    assert list(scores["scores"]) == ["psnr_db", "ssim", "lpips", "fd_colour"]
    for metric in ("psnr_db", "ssim", "lpips"):
        entry = scores["scores"][metric]
        assert entry["low"] < entry["mean"] < entry["high"] and entry["n"] == 40
    statistics = [FeatureStatistics.of("x", colour(pixels)) for pixels in (results, originals)]
    entry = scores["scores"]["fd_colour"]
    assert entry["mean"] == pytest.approx(frechet_distance(*statistics), rel=1e-9)  # two parts, one pass
    assert (entry["low"], entry["high"], entry["n"], entry["of"]) == (None, None, 40, "set")
    assert "note" not in entry
    assert scores["fingerprints"] == {"lpips": lpips.fingerprint, "fd_colour": "colour-fingerprint"}
    assert scores["protocol"]["fd_colour"]["network"] == "mean colour"
    assert "truncate" in scores["protocol"]["pixels"]
    line = json.loads((tmp_path / "out/per_item.jsonl").read_text().splitlines()[33])
    assert list(line["values"]) == ["psnr_db", "ssim", "lpips"]
    assert line["values"]["ssim"] == ssim(results[33:34], originals[33:34]).item()


def test_a_perfect_reconstruction_has_distance_zero(tmp_path: Path) -> None:
    originals = noise(8, 16, seed=7)
    images = make_set(tmp_path / "images", originals, originals)
    scores = evaluate(
        ReconstructionSuite(tmp_path / "store", distances={"fd_colour": MeanColour()}),
        images,
        tmp_path / "out",
    )
    assert scores["scores"]["ssim"]["mean"] == pytest.approx(1.0, abs=1e-12)
    assert scores["scores"]["fd_colour"]["mean"] == pytest.approx(0.0, abs=1e-9)  # of traces of about 100


def test_a_distance_from_too_few_images_says_so_in_scores_and_report(tmp_path: Path) -> None:
    originals = noise(3, 16, seed=8)
    images = make_set(tmp_path / "evaluation/images/reconstruction", originals, 255 - originals)
    suite = ReconstructionSuite(tmp_path / "store", distances={"fd_colour": MeanColour()})
    scores = evaluate(suite, images, tmp_path / "evaluation/reconstruction")
    assert "biased upwards: 3 images" in scores["scores"]["fd_colour"]["note"]
    page = render_report(tmp_path).read_text()
    assert "fd colour: biased upwards: 3 images" in page and "fd colour</th>" in page


def test_a_set_of_one_image_has_no_distance(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", noise(1, 16, seed=9), noise(1, 16, seed=10))
    with pytest.raises(UserError, match="needs two"):
        evaluate(
            ReconstructionSuite(tmp_path / "store", distances={"fd_colour": MeanColour()}),
            images,
            tmp_path / "out",
        )


def test_a_result_of_another_size_is_one_clear_line(tmp_path: Path) -> None:
    images = make_set(tmp_path / "images", noise(2, 16, seed=0), noise(2, 24, seed=0))
    with pytest.raises(UserError, match="differ in size: 24 x 24 and 16 x 16"):
        evaluate(ReconstructionSuite(tmp_path / "store"), images, tmp_path / "out")
