"""The generation suite: ADM's reference files, every score against its own definition, ranks and kills."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from base.config import UserError
from base.team import Team
from data.image_set import Item, write_image, write_manifest
from evaluation.features.feature_files import FeatureFiles
from evaluation.features.inception import AdmInception
from evaluation.metrics.frechet import gaussian_distance
from evaluation.metrics.manifold import in_manifold, radii
from evaluation.reference import Reference
from evaluation.runner import evaluate
from evaluation.suites.generation import GenerationSuite, Spaces
from helpers.rows import TensorRows

NUM_IMAGES = 40


class Network(nn.Module):
    """Four features and a layer of 8 channels, as small as can be."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Conv2d(3, 8, 20, stride=149)  # 299 px -> 2 x 2 cells
            self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layer(x).mean((2, 3)))


def tiny_inception() -> AdmInception:
    network = Network()
    classifier = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
    return AdmInception(network, network.layer, classifier)


def pictures(seed: int, shift: int) -> Tensor:
    """uint8 [N, 3, 8, 8]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (NUM_IMAGES, 3, 8, 8), generator=generator).add(shift).to(torch.uint8)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    items = []
    for index, pixels in enumerate(pictures(0, 30)):
        write_image(tmp_path / "images" / f"{index}.png", pixels)
        items.append(Item(str(index), {"result": f"{index}.png"}, {}))
    write_manifest(tmp_path / "images", items)
    return tmp_path / "images"


@pytest.fixture
def reference(tmp_path: Path) -> Path:
    """As ADM publishes one: statistics of more images than it holds."""
    features = tiny_inception()(torch.cat([pictures(1, 0), pictures(2, 10)])).double().numpy()
    arrays = {}
    for part, suffix in ((features[:, :4], ""), (features[:, 4:], "_s")):
        arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"] = part.mean(0), np.cov(part, rowvar=False)
    held = pictures(1, 0).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "reference.npz", arr_0=held, **arrays)
    return tmp_path / "reference.npz"


def suite(reference: Path, store: Path) -> GenerationSuite:
    return GenerationSuite(Reference.open(reference), Spaces(inception=tiny_inception()), store)


def test_scores_are_their_definitions_on_the_references_statistics(
    images: Path, reference: Path, tmp_path: Path
) -> None:
    scores = evaluate(suite(reference, tmp_path / "store"), images, tmp_path / "out")["scores"]
    features = tiny_inception()(pictures(0, 30))
    stored = np.load(reference)
    for metric, part, suffix in (("fid", features[:, :4], ""), ("sfid", features[:, 4:], "_s")):
        x = part.double().numpy()
        expected = gaussian_distance(
            x.mean(0), np.cov(x, rowvar=False), stored[f"mu{suffix}"], stored[f"sigma{suffix}"]
        )
        assert scores[metric]["mean"] == pytest.approx(expected, rel=1e-9), metric
    real = TensorRows(tiny_inception()(pictures(1, 0))[:, :4])
    inside = in_manifold(TensorRows(features[:, :4]), real, radii(real))
    assert scores["precision"]["mean"] == pytest.approx(inside.double().mean().item())
    assert scores["precision"]["low"] < scores["precision"]["mean"] < scores["precision"]["high"]
    assert 0 < scores["recall"]["mean"] <= 1 and scores["inception_score"]["mean"] >= 1
    assert "40 images" in scores["inception_score"]["note"]
    lines = [json.loads(line) for line in (tmp_path / "out/per_item.jsonl").read_text().splitlines()]
    assert [line["values"]["precision"] for line in lines] == inside.tolist()


def test_statistics_of_reference_images_stand_in_for_those_of_a_file(images: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "images.npz", arr_0=pictures(1, 0).permute(0, 2, 3, 1).numpy())
    scores = evaluate(suite(tmp_path / "images.npz", tmp_path / "store"), images, tmp_path / "out")["scores"]
    x, y = (tiny_inception()(pixels)[:, :4].double().numpy() for pixels in (pictures(0, 30), pictures(1, 0)))
    expected = gaussian_distance(x.mean(0), np.cov(x, rowvar=False), y.mean(0), np.cov(y, rowvar=False))
    assert scores["fid"]["mean"] == pytest.approx(expected, rel=1e-9)


def test_a_set_against_itself_is_perfect(images: Path, tmp_path: Path) -> None:
    scores = evaluate(suite(images, tmp_path / "store"), images, tmp_path / "out")["scores"]
    # The trace terms are of order 1 in fp64; the difference of equal ones is rounding.
    assert scores["fid"]["mean"] == pytest.approx(0, abs=1e-9) and scores["precision"]["mean"] == 1
    assert scores["recall"]["mean"] == 1


def run_on(world: int, suite_of: Callable[[], GenerationSuite], images: Path, out: Path) -> None:
    for rank in reversed(range(world)):  # rank 0 last: it scores what all have collected
        evaluate(suite_of(), images, out, team=Team(rank, world))


def test_ranks_and_kills_change_no_byte_of_the_scores(
    images: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(1, lambda: suite(reference, tmp_path / "one"), images, tmp_path / "out-one")
    run_on(2, lambda: suite(reference, tmp_path / "two"), images, tmp_path / "out-two")
    collect = FeatureFiles.collect

    def killed(self: FeatureFiles, rank: int = 0, world: int = 1) -> None:
        collect(self, rank, world)
        raise KeyboardInterrupt

    monkeypatch.setattr(FeatureFiles, "collect", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(suite(reference, tmp_path / "three"), images, tmp_path / "out-three")
    monkeypatch.undo()
    assert not (tmp_path / "out-three").exists()
    run_on(1, lambda: suite(reference, tmp_path / "three"), images, tmp_path / "out-three")
    for name in ("scores.json", "per_item.jsonl"):
        whole = (tmp_path / "out-one" / name).read_bytes()
        assert (
            whole
            == (tmp_path / "out-two" / name).read_bytes()
            == (tmp_path / "out-three" / name).read_bytes()
        )


def test_a_local_network_gives_numbers_of_its_own_names(
    images: Path, reference: Path, tmp_path: Path
) -> None:
    extractor = tiny_inception()
    local = GenerationSuite(Reference.open(reference), Spaces(other=extractor), tmp_path / "store")
    scores = evaluate(local, images, tmp_path / "out")["scores"]
    assert set(scores) == {"feature_distance", "kid_features", "precision_features", "recall_features"}


def test_a_reference_that_is_of_no_use_is_one_clear_line(images: Path, tmp_path: Path) -> None:
    np.savez(
        tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.eye(5), mu_s=np.zeros(28), sigma_s=np.eye(28)
    )
    other = Spaces(other=tiny_inception())
    with pytest.raises(UserError, match="without images; they are of no use for 'other'"):
        GenerationSuite(Reference.open(tmp_path / "statistics.npz"), other, tmp_path / "store")
    with pytest.raises(UserError, match="have 5 features, the network 4"):
        evaluate(suite(tmp_path / "statistics.npz", tmp_path / "store"), images, tmp_path / "out")
    np.savez(tmp_path / "other.npz", labels=np.zeros(5))
    with pytest.raises(UserError, match="holds neither arr_0 nor mu"):
        Reference.open(tmp_path / "other.npz")
    with pytest.raises(UserError, match="no feature network"):
        GenerationSuite(Reference.open(images), Spaces(), tmp_path / "store")
