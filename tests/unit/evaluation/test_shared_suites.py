"""Reconstruction and linear-probe suites on several ranks and after a kill: the bytes of one undisturbed pass."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from base.config import UserError
from base.team import Team
from data.image_set import Item, write_image, write_manifest
from evaluation.features import feature_files
from evaluation.metrics.reconstruction import MAX_DB, Lpips, psnr_db, ssim
from evaluation.runner import Suite, evaluate
from evaluation.suites.linear_probe import LinearProbeSuite, ranked
from evaluation.suites.reconstruction import ReconstructionSuite
from tokenizer.training.perceptual import LpipsVgg16

NUM_IMAGES = 22  # shards of 8, 8 and 6 images in blocks of 4
WRITTEN = ("scores.json", "per_item.jsonl")


class Clock:
    """Counts the images that a network sees; the process dies at one of them."""

    def __init__(self, die_after: int | None = None) -> None:
        self.num_images, self._die_after = 0, die_after

    def tick(self, count: int) -> None:
        if self._die_after is not None and self.num_images + count > self._die_after:
            raise KeyboardInterrupt
        self.num_images += count


class MeanColour:
    name = "colour"
    fingerprint = "colour-fingerprint"
    protocol: Mapping[str, Any] = {"network": "mean colour"}
    dim = 3

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, pixels: Tensor) -> Tensor:
        self._clock.tick(len(pixels))
        return pixels.float().mean(dim=(2, 3))


class CountedLpips(Lpips):
    def __init__(self, network: LpipsVgg16, clock: Clock) -> None:
        super().__init__(network)
        self._clock = clock

    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        self._clock.tick(len(image))
        return super().__call__(image, reference)


class Brightest:
    """Of seven classes, the one whose level is nearest to the mean of all pixels."""

    fingerprints: Mapping[str, str] = {"encoder": "none", "head": "levels"}
    protocol: Mapping[str, Any] = {"head": "mean level"}
    num_classes = 7

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        self._clock.tick(len(images))
        levels = torch.stack([image.float().mean() for image in images])
        return ranked(-(levels[:, None] - 36 * torch.arange(7)).abs())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_files, "SHARD_IMAGES", 8)
    monkeypatch.setattr(feature_files, "IMAGES_PER_CALL", 4)


@pytest.fixture(scope="module")
def network() -> LpipsVgg16:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LpipsVgg16()


def write_set(directory: Path, originals: Sequence[Tensor], results: Sequence[Tensor] = ()) -> Path:
    items = []
    for index, original in enumerate(originals):
        images = {"original": original, **({"result": results[index]} if results else {})}
        for role, pixels in images.items():
            write_image(directory / f"{index}.{role}.png", pixels)
        names = {role: f"{index}.{role}.png" for role in images}
        items.append(Item(str(index), names, {"label": index % 7}))
    write_manifest(directory, items)
    return directory


def results_and_originals() -> tuple[Tensor, Tensor]:
    """uint8 [N, 3, 16, 16] twice, with an error that grows; the first result has none."""
    noise = torch.Generator().manual_seed(0)
    originals = torch.randint(60, 200, (NUM_IMAGES, 3, 16, 16), generator=noise)
    scale = torch.linspace(0, 1, NUM_IMAGES).view(-1, 1, 1, 1)
    error = scale * torch.randint(-50, 50, originals.shape, generator=noise)
    return (originals + error).byte(), originals.byte()


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    results, originals = results_and_originals()
    return write_set(tmp_path / "images", [*originals], [*results])


@pytest.fixture
def loose(tmp_path: Path) -> Path:
    """Images of as many sizes."""
    noise = torch.Generator().manual_seed(1)
    return write_set(
        tmp_path / "images",
        [
            (torch.randint(0, 40, (3, 8 + index, 40 - index), generator=noise) + 10 * index).byte()
            for index in range(NUM_IMAGES)
        ],
    )


MakeSuite = Callable[[Path, Clock], Suite]


def reconstruction(network: LpipsVgg16) -> MakeSuite:
    return lambda store, clock: ReconstructionSuite(
        store, CountedLpips(network, clock), {"fd_colour": MeanColour(clock)}
    )


def linear(store: Path, clock: Clock) -> Suite:
    return LinearProbeSuite(Brightest(clock), store)


def check_ranks_and_kills(
    suite: MakeSuite, images: Path, tmp_path: Path, num_seen: int, deaths: Sequence[int]
) -> None:
    """`num_seen`: by all networks together. `deaths`: after how many of them a process is killed."""

    def tree(name: str) -> dict[str, bytes]:
        root = tmp_path / "stores" / name
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}

    def run(name: str, rank: int = 0, world: int = 1, die_after: int | None = None) -> int:
        clock = Clock(die_after)
        out = tmp_path / f"out-{name}"
        evaluate(suite(tmp_path / "stores" / name, clock), images, out, team=Team(rank, world))
        return clock.num_images

    assert run("whole") == num_seen
    assert run("whole") == 0  # everything is kept
    shares = [run("two", rank, 2) for rank in (1, 0)]  # rank 0 last: it scores what all have found
    assert sum(shares) == num_seen and 0 < shares[0] < shares[1]
    for death in deaths:
        name = f"killed-{death}"
        with pytest.raises(KeyboardInterrupt):
            run(name, die_after=death)
        assert not (tmp_path / f"out-{name}").exists()
        whole = tree("whole")
        for path in (tmp_path / "stores" / name).rglob("*.f*"):
            if path.stat().st_size < len(whole[str(path.relative_to(tmp_path / "stores" / name))]):
                path.write_bytes(path.read_bytes() + b"torn")  # a block that was being written
        assert run(name) == num_seen - death
        assert tree(name) == whole
    for name in ("two", *(f"killed-{death}" for death in deaths)):
        assert tree(name) == tree("whole")
        for file in WRITTEN:
            assert (tmp_path / f"out-{name}" / file).read_bytes() == (
                tmp_path / "out-whole" / file
            ).read_bytes()


def test_ranks_and_kills_change_no_byte_of_a_reconstructions_scores(
    pairs: Path, tmp_path: Path, network: LpipsVgg16
) -> None:
    # LPIPS sees 22 pairs, then the other network 22 results and 22 originals; deaths fall into each.
    check_ranks_and_kills(reconstruction(network), pairs, tmp_path, 3 * NUM_IMAGES, (0, 12, 26, 44, 60))


def test_ranks_and_kills_change_no_byte_of_a_linear_probes_scores(loose: Path, tmp_path: Path) -> None:
    check_ranks_and_kills(linear, loose, tmp_path, NUM_IMAGES, (0, 4, 20))


def test_what_is_kept_of_a_pair_is_what_the_metrics_say(
    pairs: Path, tmp_path: Path, network: LpipsVgg16
) -> None:
    evaluate(reconstruction(network)(tmp_path / "store", Clock()), pairs, tmp_path / "out")
    lines = [
        json.loads(line)["values"] for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()
    ]
    pair = results_and_originals()
    assert [line["psnr_db"] for line in lines] == psnr_db(*pair).tolist()  # fp64, to the last digit
    assert [line["ssim"] for line in lines] == ssim(*pair).tolist()
    # fp32 through 13 convolutions, in blocks of 4 there.
    assert [line["lpips"] for line in lines] == pytest.approx(
        Lpips(network)(*pair).tolist(), rel=1e-4, abs=1e-7
    )
    assert lines[0] == {"psnr_db": MAX_DB, "ssim": 1.0, "lpips": 0.0}  # equal images: nothing infinite


def test_what_is_kept_of_a_probe_is_what_the_classifier_says(loose: Path, tmp_path: Path) -> None:
    scores = evaluate(linear(tmp_path / "store", Clock()), loose, tmp_path / "out")["scores"]
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    expected = [round((10 * index + 19.5) / 36) for index in range(NUM_IMAGES)]
    assert [line["detail"]["predicted"] for line in lines] == expected
    assert scores["top1"]["mean"] == sum(e == i % 7 for i, e in enumerate(expected)) / NUM_IMAGES
    assert scores["top1"]["mean"] < scores["top5"]["mean"] < 1


def test_a_score_that_is_not_defined_is_kept_as_such(tmp_path: Path) -> None:
    tiny = [torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (10, 20, 30)]
    images = write_set(tmp_path / "images", tiny, [image + 1 for image in tiny])
    scores = evaluate(ReconstructionSuite(tmp_path / "store"), images, tmp_path / "out")["scores"]
    assert (scores["ssim"]["mean"], scores["ssim"]["n"]) == (None, 0)  # below 6 px
    assert scores["psnr_db"]["mean"] == pytest.approx(20 * math.log10(255)) and scores["psnr_db"]["n"] == 3


def test_a_broken_lpips_is_refused_and_not_left_out(pairs: Path, tmp_path: Path, network: LpipsVgg16) -> None:
    class Broken(CountedLpips):
        def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
            return super().__call__(image, reference) * math.nan

    with pytest.raises(UserError, match="lpips: some distances are not finite"):
        evaluate(ReconstructionSuite(tmp_path / "store", Broken(network, Clock())), pairs, tmp_path / "out")


def test_changed_images_are_measured_again_by_the_same_suite(pairs: Path, tmp_path: Path) -> None:
    suite = ReconstructionSuite(tmp_path / "store")
    before = evaluate(suite, pairs, tmp_path / "out")["scores"]["psnr_db"]["mean"]
    (pairs / "5.result.png").write_bytes((pairs / "5.original.png").read_bytes())
    after = evaluate(suite, pairs, tmp_path / "out")["scores"]["psnr_db"]["mean"]
    lines = (tmp_path / "out/per_item.jsonl").read_text().splitlines()
    assert after > before and json.loads(lines[5])["values"]["psnr_db"] == MAX_DB


def test_a_bad_label_is_found_before_the_work_and_not_after_it(loose: Path, tmp_path: Path) -> None:
    items = (loose / "manifest.jsonl").read_text().splitlines()
    items[-1] = items[-1].replace(f'"label": {(NUM_IMAGES - 1) % 7}', '"label": "dog"')
    (loose / "manifest.jsonl").write_text("\n".join(items) + "\n")
    clock = Clock()
    with pytest.raises(UserError, match="must be an integer, not 'dog'"):
        evaluate(linear(tmp_path / "store", clock), loose, tmp_path / "out")
    assert clock.num_images == 0
