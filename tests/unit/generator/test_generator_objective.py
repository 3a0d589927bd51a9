"""Flow matching: its equations, the loss of a pack, and what a training run refuses to start from."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from base.config import ConfigError, UserError, from_dict, to_dict
from base.objective import HISTORY_WINDOWS, LossOutput
from data.packs.packed_batch import PackedBatch, TextSplit, build_packed_batch
from data.shards import LatentInfo
from engine.metric_window import Window
from generator.config import FlowConfig, GeneratorConfig
from generator.embeddings import grid_sinusoids, time_sinusoids
from generator.flow import draw_times, interpolate, resolve_shift, sampling_times, shift_time, velocity_target
from generator.model import Generator
from generator.objective import FlowObjective, Preview, build_objective, check_latents, tile
from generator.sampling import Condition
from generator.sampling_config import SamplingConfig
from helpers import packs
from helpers.generators import BACKBONE
from helpers.packs import image
from helpers.texts import Letters

SHAPE = (4, 2, 3)
LATENTS = LatentInfo("fp32", SHAPE, (0.0,) * 4, (1.0,) * 4, "autoencoder", "text")
CONFIG = GeneratorConfig(
    backbone=BACKBONE,
    max_side=4,
)


def pack(seed: int = 7) -> PackedBatch:
    samples = [
        [TextSplit([1, 5, 2]), image(0, noisy=True, shape=SHAPE)],
        [image(1, noisy=False, shape=SHAPE), TextSplit([1, 2]), image(2, noisy=True, shape=SHAPE)],
    ]
    return packs.pack(samples, seed=seed)


def build(**options):
    arguments = {"generator": CONFIG, "flow": FlowConfig(), "latents": LATENTS, "text_tokenizer": Letters()}
    return build_objective("t2i", **(arguments | options), seed=0)


def test_the_shift_follows_the_latent_size() -> None:
    assert resolve_shift("auto", (64, 16, 16)) == 2.0  # docs/method.md: s = sqrt(64 * 16 * 16 / 4096)
    assert resolve_shift("auto", (768, 16, 16)) == pytest.approx(6.93, abs=0.005)  # RAE
    assert resolve_shift(1.5, (64, 16, 16)) == 1.5


def test_time_runs_from_noise_to_data_and_the_shift_moves_it_towards_noise() -> None:
    times = sampling_times(4, 3.0)
    assert times == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0])  # 3 t / (1 + 2 t) at 1, 3/4, 1/2, 1/4, 0
    t = torch.linspace(0, 1, 5)
    assert torch.equal(shift_time(t, 1.0), t)


def test_drawn_times_are_logit_normal_under_the_shift() -> None:
    plain, shifted = (draw_times(20_000, s, torch.Generator().manual_seed(1)) for s in (1.0, 2.0))
    logits = torch.logit(plain)
    # standard error of a mean of 20,000 is 0.007: five of them
    assert abs(float(logits.mean())) < 0.035 and abs(float(logits.std()) - 1) < 0.035
    # s t / (1 + (s - 1) t) adds log s to the logit
    torch.testing.assert_close(torch.logit(shifted), logits + math.log(2), rtol=0, atol=1e-4)


def test_the_target_is_the_derivative_of_the_path() -> None:
    z, noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor(0.3, dtype=torch.float64)
    step = (interpolate(z, noise, t + 1e-6) - interpolate(z, noise, t - 1e-6)) / 2e-6
    torch.testing.assert_close(step, velocity_target(z, noise), rtol=0, atol=1e-8)
    assert torch.equal(interpolate(z, noise, torch.tensor(0.0)), z)
    assert torch.equal(interpolate(z, noise, torch.tensor(1.0)), noise)


def test_sinusoids_have_bagels_layout() -> None:
    t = torch.tensor([0.0, 0.7])
    expected = [math.cos(0.7), math.sin(0.7), math.cos(0.7 * 10_000 ** (-127 / 128))]
    found = time_sinusoids(t)
    assert found.shape == (2, 256)
    assert found[1, [0, 128, 127]].tolist() == pytest.approx(expected, abs=1e-6)
    assert found[0].tolist() == [1.0] * 128 + [0.0] * 128
    y, x, side, width = 2, 3, 4, 16
    for max_period, arguments in ((10_000, ()), (10, (10.0,))):  # Bagel's, and one for small grids
        row = grid_sinusoids(torch.tensor([y * side + x]), side, width, *arguments)[0].tolist()
        w = [max_period ** (-k / 4) for k in range(4)]
        parts = [f(p * k) for p in (x, y) for f in (math.sin, math.cos) for k in w]
        assert row == pytest.approx(parts, abs=1e-6)


def test_the_position_period_is_part_of_the_model() -> None:
    small = dataclasses.replace(CONFIG, position_max_period=10.0)
    grid = torch.tensor([5])
    rows = [
        Generator.create(config, LATENTS, 0).latent_embedding(
            torch.zeros(1, LATENTS.shape[0]), torch.zeros(1), torch.tensor([0]), grid
        )
        for config in (CONFIG, small)
    ]
    difference = grid_sinusoids(grid, CONFIG.max_side, CONFIG.backbone.width, 10.0) - grid_sinusoids(
        grid, CONFIG.max_side, CONFIG.backbone.width
    )
    torch.testing.assert_close(rows[1] - rows[0], difference)
    with pytest.raises(ConfigError, match="position_max_period is 1"):
        dataclasses.replace(CONFIG, position_max_period=1.0)


def test_the_loss_sum_counts_noisy_tokens_only() -> None:
    objective, batch = build(), pack()
    output = objective.loss(batch, step=0)
    assert objective.count(batch) == 12
    # a new model says v = 0, so the loss is the mean square of eps - z over the noisy tokens
    generator = torch.Generator().manual_seed(batch.seed)
    torch.randn(2, generator=generator)  # one time per noisy image is drawn first
    noise = torch.randn((12, 4), generator=generator)
    expected = (noise - batch.latents[-12:]).square().mean(1).sum()
    torch.testing.assert_close(output.loss_sum, expected)
    assert torch.equal(output.metrics["loss"], output.loss_sum.detach())


def test_noise_follows_the_batch_seed_and_leaves_the_global_state_alone() -> None:
    objective, before = build(), torch.get_rng_state()
    first, again, other = (objective.loss(pack(seed), 0).loss_sum for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_clean_images_enter_as_themselves_at_time_zero(monkeypatch) -> None:
    objective, batch, seen = build(), pack(), {}

    def spy(_batch: PackedBatch, x: Tensor, t: Tensor) -> Tensor:
        seen.update(x=x, t=t)
        return torch.zeros(12, 4)

    monkeypatch.setattr(objective.model, "forward", spy)
    objective.loss(batch, 0)
    clean = batch.image_index == 0  # numbered first
    assert torch.equal(seen["x"][clean], batch.latents[clean])
    assert seen["t"][0] == 0 and (seen["t"][1:] > 0).all()
    assert not torch.equal(seen["x"][~clean], batch.latents[~clean])


def test_training_lowers_the_loss() -> None:
    objective, batch = build(), pack()
    optimizer = torch.optim.AdamW([p for p in objective.model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = objective.loss(batch, 0).loss_sum / objective.count(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]  # one fixed pack and noise: memorised


def test_samples_are_one_picture_with_sources_above() -> None:
    source = torch.zeros(SHAPE)

    def decode(z: Tensor) -> Tensor:
        return z[:, :3].sigmoid()

    sampling = SamplingConfig(num_steps=2)
    conditions = tuple(Condition((1, 5, 2), (source,)) for _ in range(3))
    picture = build(preview=Preview(conditions, sampling, decode)).samples()
    assert picture is not None and picture.dtype == np.uint8 and picture.shape == (2 * 2, 3 * 3, 3)
    assert (picture[:2] == 128).all()  # sigmoid(0) of the sources
    assert build().samples() is None


def test_a_run_says_what_it_starts_from_and_on_which_kernel() -> None:
    size, start, kernel = build().describe()
    assert "are trained" in size and start == "start: random; time shift 0.0765"  # sqrt(4 * 2 * 3 / 4096)
    assert kernel.startswith("attention: ")


def test_tiles_lie_left_to_right() -> None:
    picture = tile([torch.stack([torch.zeros(3, 2, 2), torch.ones(3, 2, 2)])])
    assert picture[:, :2].max() == 0 and picture[:, 2:].min() == 255


def test_an_edit_run_starts_from_exported_weights(tmp_path) -> None:
    first = build()
    first.model.latent_out.bias.data.fill_(0.5)
    first.export(tmp_path)
    second = build(flow=FlowConfig(init_from=str(tmp_path)))
    assert (second.model.latent_out.bias == 0.5).all() and second.model.latents == LATENTS
    assert second.fingerprints()["start"] != first.fingerprints()["start"]
    assert second.fingerprints()["tokenizer"] == "autoencoder"
    wider = dataclasses.replace(CONFIG, max_side=8)
    with pytest.raises(UserError, match=r"shape differs.*generator\.max_side: \d+ there, 8 here"):
        build(flow=FlowConfig(init_from=str(tmp_path)), generator=wider)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokenizer_fingerprint": "other"}, "autoencoder autoencoder, the data has other"),
        ({"text_tokenizer_fingerprint": "other"}, "text tokenizer text, the data has other"),
        ({"shape": (4, 3, 3)}, r"latent shape \(4, 2, 3\)"),
        ({"mean": (0.0, 0.0, 0.0, 1.0)}, "other latent statistics.*statistics_from"),
        ({"std": (1.0, 1.0, 1.0, 2.0)}, "other latent statistics.*statistics_from"),
    ],
)
def test_latents_of_another_kind_are_refused_in_one_line(change, words) -> None:
    with pytest.raises(UserError, match=words) as error:
        check_latents(dataclasses.replace(LATENTS, **change), LATENTS, where="runs/t2i")
    assert str(error.value).startswith("runs/t2i: ") and "\n" not in str(error.value)
    check_latents(LATENTS, LATENTS, where="runs/t2i")


def test_a_text_tokenizer_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="another text tokenizer"):
        build(latents=dataclasses.replace(LATENTS, text_tokenizer_fingerprint="other"))
    small = dataclasses.replace(CONFIG, backbone=dataclasses.replace(CONFIG.backbone, vocab_size=30))
    with pytest.raises(UserError, match="vocab_size 30 is less"):
        build(generator=small)


def test_configs_refuse_shapes_that_cannot_be_built() -> None:
    assert from_dict(GeneratorConfig, to_dict(CONFIG)) == CONFIG
    assert from_dict(FlowConfig, {"time_shift": 2.0}).time_shift == 2.0
    with pytest.raises(ConfigError, match="num_kv_heads"):
        dataclasses.replace(CONFIG.backbone, num_kv_heads=3)
    with pytest.raises(ConfigError, match="init 'qwn'"):
        GeneratorConfig(CONFIG.backbone, 4, init="qwn")
    with pytest.raises(ConfigError, match="max_side 2 is less"):
        Generator.create(dataclasses.replace(CONFIG, max_side=2), LATENTS, 0)


def talking() -> FlowObjective:
    return build(
        generator=dataclasses.replace(CONFIG, text_output=True), flow=FlowConfig(text_loss_weight=0.5)
    )


def test_a_text_loss_without_any_text_is_told_once() -> None:
    objective, silent = talking(), {"loss": 1.0, "samples": 300.0}
    assert [objective.alarms([silent] * count) for count in (1, 2, 3)] == [[]] * 3
    (alarm,) = objective.alarms([silent] * 4)
    assert alarm.startswith("flow.text_loss_weight is 0.5, but none of 1,200 samples marks a text for it")
    assert objective.alarms([silent] * 5) == []
    (alarm,) = talking().alarms([{"loss": 1.0, "samples": 2.0}] * HISTORY_WINDOWS)
    assert "none of 40 samples" in alarm, "small windows do not hide it"


def test_rare_text_and_runs_without_a_text_loss_raise_no_alarm() -> None:
    silent, spoken = {"loss": 1.0, "samples": 900.0}, {"loss": 1.0, "text_loss": 3.0, "samples": 900.0}
    objective = talking()
    assert objective.alarms([silent]) == objective.alarms([silent, spoken]) == []
    assert objective.alarms([silent] * HISTORY_WINDOWS) == [], "the window with text has been forgotten"
    assert build().alarms([silent] * HISTORY_WINDOWS) == []


class OneRank:
    """The collectives of one rank."""

    world = 1

    def sum(self, values: list[float]) -> list[float]:
        return values

    def sum_on_device(self, values: Tensor) -> Tensor:
        return values


def test_a_window_without_marked_text_logs_no_text_loss() -> None:
    objective = talking()
    learned = build_packed_batch(
        [[TextSplit([1, 5, 2], loss=True), image(0, noisy=True)]],
        vision_start_id=28,
        vision_end_id=29,
        max_side=4,
        seed=7,
        sample_ids=["a"],
    )
    for batch, names in ((pack(), {"loss"}), (learned, {"loss", "text_loss"})):
        window = Window(OneRank())
        output = objective.loss(batch, 0)
        window.add("", output, 1.0)
        window.add("text_", LossOutput(output.further["text"].loss_sum), 1.0)
        counts = {"": objective.count(batch), "text_": objective.further_counts(batch)["text"]}
        window.close_step(counts, {"samples": 1.0}, 1.0)
        assert {name for name in window.read() if name.endswith("loss")} == names
