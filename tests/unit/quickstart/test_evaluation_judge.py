"""The judge's labels, loss, training and export."""

from pathlib import Path

import pytest
import torch

from base.config import ConfigError, UserError
from data.samples.images import PixelBatch
from quickstart.config import JudgeConfig
from quickstart.judge import Judge, JudgeObjective, augment
from quickstart.judge_network import SceneClasses, cell_loss, cell_targets, object_evidence

CLASSES = SceneClasses(objects=("cross", "square"), backgrounds=("dark", "light"))
SMALL = JudgeConfig(channels=(16, 16, 32))
NUM_STEPS = 60


def shapes_batch(num_images: int, seed: int) -> PixelBatch:
    """A yellow cross or a white square of 16 px on one of two greys, 32 px."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.empty(num_images, 3, 32, 32, dtype=torch.uint8)
    meta = []
    for index in range(num_images):
        kind, background = torch.randint(2, (2,), generator=generator).tolist()
        x0, y0 = torch.randint(4, 13, (2,), generator=generator).tolist()
        pixels[index] = 30 if background == 0 else 120
        if kind == 1:
            pixels[index, :, y0 : y0 + 16, x0 : x0 + 16] = 255
        else:
            pixels[index, :2, y0 + 4 : y0 + 12, x0 : x0 + 16] = 255
            pixels[index, :2, y0 : y0 + 16, x0 + 4 : x0 + 12] = 255
        thing = {"name": CLASSES.objects[kind], "box": [x0, y0, x0 + 16, y0 + 16]}
        scene = {"objects": [thing], "background": CLASSES.backgrounds[background]}
        meta.append({"scene": scene})
    return PixelBatch(pixels, tuple(map(str, range(num_images))), seed, tuple(meta))


def test_every_object_has_a_core_however_it_lies_on_the_grid() -> None:
    for x0 in range(16):
        for size in (10, 16, 24):
            targets = cell_targets([(0, (x0, 3, x0 + size, 3 + size))], size_px=64, none=2)
            assert (targets == 0).any()
            assert targets.shape == (8, 8)


def test_cells_away_from_boxes_are_empty_and_near_their_edges_undecided() -> None:
    targets = cell_targets([(1, (0, 0, 32, 32))], size_px=64, none=2)
    assert targets[0, 0] == -2 and targets[1, 1] == 1
    assert (targets[4:] == 2).all() and (targets[:, 4:] == 2).all()


def test_at_an_objects_edge_none_and_the_object_are_both_right() -> None:
    targets = torch.tensor([[[-1, 2]]])  # edge of class 0, and an empty cell
    empty = torch.tensor([0.0, 0.0, 20.0])

    def loss(edge_logits: list[float]) -> float:
        logits = torch.stack([torch.tensor(edge_logits), empty], 1)[None, :, None]
        return cell_loss(logits, targets).item()

    assert loss([20.0, 0.0, 0.0]) < 1e-6 and loss([0.0, 0.0, 20.0]) < 1e-6  # e^-20 is left
    assert loss([0.0, 20.0, 0.0]) > 15


def test_an_objects_evidence_is_its_best_cell() -> None:
    logits = torch.zeros(1, 3, 2, 4)
    logits[0, 1, 1, 2] = 30.0
    probabilities, cells = object_evidence(logits)
    assert cells[0, 1] == 1 * 4 + 2
    assert probabilities[0].tolist() == pytest.approx([1 / 3, 1.0], abs=1e-6)  # fp32 softmax


def test_the_loop_teaches_it_and_its_export_answers_the_same(tmp_path: Path) -> None:
    objective = JudgeObjective(SMALL, CLASSES)
    optimizer = torch.optim.AdamW(objective.model.parameters())
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / NUM_STEPS)
        batch = shapes_batch(32, seed=step)
        output = objective.loss(batch, step)
        (output.loss_sum / objective.count(batch)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    objective.export(tmp_path)
    judge = Judge.load(tmp_path)
    held_out = shapes_batch(64, seed=1000)
    verdicts = judge(held_out.pixels)
    right = 0
    for found, meta in zip(verdicts, held_out.meta, strict=True):
        (thing,) = meta["scene"]["objects"]
        right += found.objects == (thing["name"],) and found.background == meta["scene"]["background"]
        x, y = found.centres[thing["name"]]
        assert abs(x - (thing["box"][0] + 8)) <= 12 and abs(y - (thing["box"][1] + 8)) <= 12
    assert right >= 61  # 64 of 64 when written; chance is 1 in 4
    direct = Judge(CLASSES, objective.model)
    assert direct.fingerprint == judge.fingerprint
    assert [found.object_scores for found in direct(held_out.pixels)] == [f.object_scores for f in verdicts]


def test_loss_depends_on_the_batch_alone() -> None:
    batch = shapes_batch(4, seed=3)
    objective = JudgeObjective(SMALL, CLASSES)
    first = objective.loss(batch, 0).loss_sum.item()
    torch.rand(7)  # the global generator moves on
    assert objective.loss(batch, 5).loss_sum.item() == first
    assert JudgeObjective(SMALL, CLASSES).loss(batch, 0).loss_sum.item() == first


def test_metrics_are_sums_over_the_batch() -> None:
    objective = JudgeObjective(SMALL, CLASSES)
    batch = shapes_batch(6, seed=4)
    output = objective.loss(batch, 0)
    assert objective.count(batch) == 6
    assert 0 <= output.metrics["background_right"].item() <= 6
    total = output.metrics["object_loss"] + 0.5 * output.metrics["background_loss"]
    assert output.loss_sum.item() == pytest.approx(total.item(), rel=1e-6)  # the same fp32 sum


def test_augmentation_stays_in_range_and_close() -> None:
    pixels_01 = shapes_batch(16, seed=5).pixels_01
    changed = augment(pixels_01, torch.Generator().manual_seed(0))
    assert changed.shape == pixels_01.shape and changed.min() >= 0 and changed.max() <= 1
    # Blur of an edge moves single pixels by more; the mean change is a few of 255 levels.
    assert 0.005 < (changed - pixels_01).abs().mean() < 0.1


def test_a_scene_with_an_unknown_object_is_one_clear_line() -> None:
    batch = shapes_batch(1, seed=6)
    thing = {"name": "triangle", "box": [0, 0, 16, 16]}
    meta = ({"scene": {"objects": [thing], "background": "dark"}},)
    with pytest.raises(UserError, match="'triangle'"):
        JudgeObjective(SMALL, CLASSES).loss(PixelBatch(batch.pixels, ("0",), 0, meta), 0)
    with pytest.raises(UserError, match="'objects'"):
        JudgeObjective(SMALL, CLASSES).loss(PixelBatch(batch.pixels, ("0",), 0, ({},)), 0)


def test_bad_classes_and_sizes_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        SceneClasses(objects=("a", "a"), backgrounds=("b",))
    with pytest.raises(ConfigError, match="multiples of 8"):
        JudgeConfig(channels=(8, 12, 16))


def test_a_judge_that_was_not_trained_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train the judge first"):
        Judge.load(tmp_path)
