"""The stages' objectives: gradients, what is trained, what is anchored, repeatability."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from base.config import ConfigError, UserError, dump, load
from base.objective import Objective
from data.samples.images import PixelBatch
from helpers.stages import BRIDGE, PIVOT, PLAIN, VIT, pixel_batch
from launch.runs.configs import TokenizerRun
from quickstart.config import StandInConfig
from quickstart.standin import IdentityObjective
from tokenizer.config import RepresentationConfig
from tokenizer.rpiae import Autoencoder
from tokenizer.training.adaptive_reference import plain_mean_loss
from tokenizer.training.build_stage import build_stage, build_untrained
from tokenizer.training.objective_base import StageObjective
from tokenizer.training.objectives import PivotObjective
from tokenizer.training.stage_config import PerceptualConfig, StageConfig
from tokenizer.weights import state_hash

JOINT = dataclasses.replace(PIVOT, stage="joint", autoencoder=dataclasses.replace(PLAIN, bridge=BRIDGE))
VALIDATION = torch.randint(
    0, 256, (10, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(9)
)


def moved(objective: StageObjective) -> StageObjective:
    """As after some training: E has left its replica, so that every loss and weight is of ordinary size."""
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
    return objective


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


@pytest.mark.parametrize("config", [PIVOT, JOINT], ids=["pivot", "joint"])
def test_gradients_equal_those_of_the_plain_backward_passes(config: StageConfig) -> None:
    objective = moved(build_stage(config))
    assert isinstance(objective, PivotObjective)
    out = objective.loss(pixel_batch(), step=0)
    (out.loss_sum / 3).backward()  # type: ignore[no-untyped-call]
    ours = gradients(objective.model)
    objective.model.zero_grad()
    plain = plain_mean_loss(objective, pixel_batch(), step=0)
    plain.backward()  # type: ignore[no-untyped-call]
    expected = gradients(objective.model)
    assert ours.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        # fp32: the same sums in another order. Entries far below the largest carry its rounding, hence atol.
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6 * largest, msg=name)
    # The scalar reads the true loss although another one is differentiated.
    assert float(out.loss_sum.detach()) / 3 == pytest.approx(float(plain.detach()), rel=1e-5)


@pytest.mark.parametrize("library", ["timm", "transformers"])
@pytest.mark.parametrize("kind", ["vit", "cnn"])
def test_activation_checkpointing_changes_no_gradient(library: str, kind: str) -> None:
    vit = VIT
    if library == "transformers":
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32}
        vit = RepresentationConfig(
            "tiny", 32, "random", {"model_type": "dinov2", "patch_size": 8, **sizes}, library="transformers"
        )
    decoder = dataclasses.replace(
        PLAIN.decoder, kind=kind, base_channels=32, channel_multipliers=(1, 1, 2, 2), blocks_per_level=1
    )
    autoencoder = dataclasses.replace(JOINT.autoencoder or PLAIN, representation=vit, decoder=decoder)
    found = []
    for checkpointing in (False, True):
        config = dataclasses.replace(JOINT, autoencoder=autoencoder, activation_checkpointing=checkpointing)
        objective = moved(build_stage(config))
        objective.model.train()
        objective.loss(pixel_batch(), step=0).loss_sum.backward()  # type: ignore[no-untyped-call]
        found.append(gradients(objective.model))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():  # the same operations on the same numbers
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=0, msg=name)


def test_bf16_autocast_keeps_the_direction_of_the_gradient() -> None:
    flat = []
    for enabled in (False, True):
        objective = moved(build_stage(JOINT))
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = objective.loss(pixel_batch(), step=0)
            adversary = objective.adversary_loss(out.adversary_batch, step=0)
        (out.loss_sum + adversary.loss_sum).backward()  # type: ignore[no-untyped-call]
        assert out.loss_sum.dtype == adversary.loss_sum.dtype == torch.float32
        flat.append(torch.cat([gradient.flatten() for gradient in gradients(objective.model).values()]))
    # bf16 rounds each product to 8 bits (0.4%); an error of one percent lowers the cosine by about 10^-4.
    assert float(F.cosine_similarity(flat[0], flat[1], dim=0)) > 0.999


def test_discriminator_takes_no_gradient_from_the_decoders_loss() -> None:
    objective = moved(build_stage(PIVOT))
    objective.loss(pixel_batch(), step=0).loss_sum.backward()  # type: ignore[no-untyped-call]
    assert objective.adversary is not None
    assert all(parameter.grad is None for parameter in objective.adversary.parameters())


def test_discriminator_update_leaves_the_autoencoder_alone() -> None:
    objective = moved(build_stage(PIVOT))
    handed_over = objective.loss(pixel_batch(), step=0).adversary_batch
    out = objective.adversary_loss(handed_over, step=0)
    out.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert objective.adversary is not None
    assert all(parameter.grad is not None for parameter in objective.adversary.parameters())
    assert not gradients(objective.model)
    assert 0 <= float(out.metrics["accuracy_fake"]) / 3 <= 1
    levels = handed_over.fake_01 * 255
    assert torch.equal(levels, levels.round())


def test_adversarial_loss_enters_at_its_step() -> None:
    config = dataclasses.replace(PIVOT, gan_update_start_step=2, gan_loss_start_step=3)
    objective = build_stage(config)
    assert [objective.adversary_active(step) for step in range(4)] == [False, False, True, True]
    outs = [objective.loss(pixel_batch(), step) for step in range(4)]
    assert ["gan" in out.metrics for out in outs] == [False, False, False, True]
    assert [out.adversary_batch is not None for out in outs] == [False, False, True, True]


def test_pivot_weight_is_one_before_its_step_and_pivot_loss_starts_at_zero() -> None:
    objective = build_stage(dataclasses.replace(PIVOT, adaptive_pivot_start_step=2, discriminator=None))
    first = objective.loss(pixel_batch(), step=1)
    assert float(first.metrics["pivot"]) == 0.0
    assert float(first.metrics["lambda_pivot"]) == 3.0  # 1, summed over three images
    assert float(moved(objective).loss(pixel_batch(), step=2).metrics["lambda_pivot"]) != 3.0


def test_replica_stays_when_the_encoder_is_loaded_from_a_checkpoint() -> None:
    objective = build_stage(PIVOT)
    assert isinstance(objective, PivotObjective)
    initial = state_hash(objective.replica)
    trained = moved(build_stage(PIVOT)).model.state_dict()
    objective.model.load_state_dict(trained)
    assert state_hash(objective.replica) == initial == state_hash(build_stage(PIVOT).model.encoder)
    assert float(objective.loss(pixel_batch(), step=0).metrics["pivot"]) > 0


def test_fingerprints_name_the_initial_weights() -> None:
    first, again = build_stage(PIVOT), build_stage(PIVOT)
    assert first.fingerprints() == again.fingerprints()
    other = build_stage(dataclasses.replace(PIVOT, seed=1))
    assert first.fingerprints()["initial_weights"] != other.fingerprints()["initial_weights"]


def test_nothing_depends_on_the_global_random_state() -> None:
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        objective = moved(build_stage(PIVOT))
        out = objective.loss(pixel_batch(), step=0)
        out.loss_sum.backward()  # type: ignore[no-untyped-call]
        adversary = objective.adversary_loss(out.adversary_batch, step=0)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((out.loss_sum.detach(), adversary.loss_sum.detach(), gradients(objective.model)))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert all(torch.equal(results[0][2][name], results[1][2][name]) for name in results[0][2])


def test_another_batch_seed_draws_other_noise() -> None:
    objective = build_stage(dataclasses.replace(PIVOT, discriminator=None))
    same_pixels = dataclasses.replace(pixel_batch(), seed=6)
    assert float(objective.loss(pixel_batch(), 0).loss_sum.detach()) != float(
        objective.loss(same_pixels, 0).loss_sum.detach()
    )


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    root = tmp_path_factory.mktemp("exports")
    build_stage(PIVOT).export(root / "pivot")
    bridge = dataclasses.replace(
        PIVOT, stage="bridge", autoencoder=None, init_from=str(root / "pivot"), bridge=BRIDGE
    )
    build_stage(bridge).export(root / "bridge")
    yield {"pivot": root / "pivot", "bridge": root / "bridge"}


def stage_from(exports: dict[str, Path], stage: str, **changes: Any) -> StageConfig:
    before = {"bridge": "pivot", "decoder": "bridge"}[stage]
    arguments = {"bridge": BRIDGE if stage == "bridge" else None, **changes}
    return dataclasses.replace(
        PIVOT, stage=stage, autoencoder=None, init_from=str(exports[before]), **arguments
    )


@pytest.mark.parametrize(
    ("stage", "trained"),
    [("pivot", {"encoder", "decoder"}), ("bridge", {"bridge"}), ("decoder", {"decoder"})],
)
def test_a_stage_trains_its_parts_and_no_other(
    exports: dict[str, Path], stage: str, trained: set[str]
) -> None:
    objective: Objective = build_stage(PIVOT if stage == "pivot" else stage_from(exports, stage))
    objective.loss(pixel_batch(), step=0).loss_sum.backward()  # type: ignore[no-untyped-call]
    for name, parameter in objective.model.named_parameters():
        wanted = name.split(".")[0] in trained
        assert parameter.requires_grad == wanted, name
        assert (parameter.grad is not None) == wanted, name


@pytest.mark.parametrize("stage", ["pivot", "bridge", "decoder", "joint"])
def test_twenty_steps_lower_the_loss(exports: dict[str, Path], stage: str) -> None:
    config = {"pivot": PIVOT, "joint": JOINT}.get(stage) or stage_from(exports, stage)
    objective = build_stage(dataclasses.replace(config, discriminator=None))
    trained = [parameter for parameter in objective.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-3)
    values = []
    for step in range(20):
        out = objective.loss(coloured_batch(0), step)
        optimizer.zero_grad()
        (out.loss_sum / 24).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        values.append(float(out.metrics["feature" if stage == "bridge" else "rec"]))
    # The same batch and noise every step, so any working optimisation lowers it, by more than a tenth.
    assert values[-1] < 0.9 * values[0]


def test_a_frozen_encoder_leaves_the_decoder_alone_to_learn() -> None:
    objective = moved(build_stage(dataclasses.replace(PIVOT, train_encoder=False)))
    out = objective.loss(pixel_batch(), step=0)
    out.loss_sum.backward()  # type: ignore[no-untyped-call]
    assert {name.split(".")[0] for name in gradients(objective.model)} == {"decoder"}
    assert "lambda_gan" in out.metrics and "pivot" not in out.metrics


def test_bridge_stage_without_pixels_leaves_the_decoder_out(exports: dict[str, Path]) -> None:
    objective = build_stage(stage_from(exports, "bridge", rec_weight=0.0))
    objective.model.decoder.forward = None  # type: ignore[assignment]
    out = objective.loss(pixel_batch(), step=0)
    assert set(out.metrics) == {"feature", "kl"}
    expected = out.metrics["feature"] + 1e-3 * out.metrics["kl"]
    torch.testing.assert_close(out.loss_sum.detach(), expected)


def test_bridge_stage_keeps_the_pivot_stages_weights(exports: dict[str, Path]) -> None:
    before, after = Autoencoder.load(exports["pivot"]), Autoencoder.load(exports["bridge"])
    assert state_hash(before.encoder, before.decoder) == state_hash(after.encoder, after.decoder)
    assert after.latent_shape == (6, 4, 4)


def test_samples_show_originals_above_reconstructions() -> None:
    objective = build_stage(dataclasses.replace(PIVOT, discriminator=None), VALIDATION)
    grid = objective.samples()
    assert grid is not None and grid.shape == (4 * 32, 8 * 32, 3)  # ten images: rows of 8 and 2, each twice
    original = VALIDATION[9].permute(1, 2, 0).numpy()
    assert (grid[64:96, 32:64] == original).all()
    decoded = objective.model.decode(objective.model.encode(VALIDATION[9:].float() / 255))[0]
    expected = (decoded.detach().clamp(0, 1) * 255).permute(1, 2, 0)
    # 8-bit rounding, and the last digits of a batched against a single pass.
    assert float((torch.from_numpy(grid[96:, 32:64].copy()) - expected).abs().max()) <= 0.51
    assert (grid[64:, 64:] == 255).all()
    assert build_stage(dataclasses.replace(PIVOT, discriminator=None)).samples() is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init_from": "somewhere"}, "exactly one of autoencoder"),
        ({"autoencoder": None}, "exactly one of autoencoder"),
        ({"bridge": BRIDGE}, "belongs to the bridge stage"),
        ({"stage": "bridge"}, "needs init_from"),
        ({"stage": "joint"}, "has no bridge"),
        ({"stage": "joint", "train_encoder": False}, "belongs to the pivot stage"),
        ({"autoencoder": JOINT.autoencoder}, "the pivot stage trains without"),
        ({"stage": "decoder", "autoencoder": None, "init_from": "x", "noise_tau": 0.8}, "has no noise"),
        ({"autoencoder": None, "init_from": "/nowhere"}, "no autoencoder there"),
        ({"perceptual": PerceptualConfig("representation")}, "needs the section perceptual.representation"),
    ],
)
def test_configs_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_stage(dataclasses.replace(PIVOT, **changes))


def test_the_decoder_stage_does_not_skip_the_bridge_stage(exports: dict[str, Path]) -> None:
    config = dataclasses.replace(stage_from(exports, "decoder"), init_from=str(exports["pivot"]))
    with pytest.raises(UserError, match="give the bridge stage's export"):
        build_stage(config)


def test_a_second_bridge_is_refused(exports: dict[str, Path]) -> None:
    config = dataclasses.replace(stage_from(exports, "bridge"), init_from=str(exports["bridge"]))
    with pytest.raises(UserError, match="already has a bridge"):
        build_stage(config)
    assert build_stage(dataclasses.replace(config, bridge=None)).model.bridge is not None


@pytest.mark.parametrize("config", [PIVOT, JOINT])
def test_config_survives_yaml(config: StageConfig, tmp_path: Path) -> None:
    (tmp_path / "stage.yaml").write_text(dump(config))
    assert load(StageConfig, tmp_path / "stage.yaml") == config


def test_description_names_what_is_used() -> None:
    text = "\n".join(build_stage(PIVOT).describe())
    for part in ("stage pivot", "tau 0.8", "in place of LPIPS", "adversarial loss", "48x4x4"):
        assert part in text


def coloured_batch(seed: int) -> PixelBatch:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (24,), generator=rng).tolist()
    pixels = torch.randint(0, 100, (24, 3, 32, 32), dtype=torch.uint8, generator=rng)
    for image, label in zip(pixels, labels, strict=True):
        image[label] += 120
    return PixelBatch(pixels, tuple(map(str, range(24))), seed, tuple({"label": label} for label in labels))


def test_stand_in_learns_and_its_export_becomes_a_representation_model(tmp_path: Path) -> None:
    objective = IdentityObjective(StandInConfig(VIT, num_classes=3))
    optimizer = torch.optim.AdamW(objective.model.parameters(), lr=1e-3)
    for step in range(15):
        out = objective.loss(coloured_batch(step), step)
        optimizer.zero_grad()
        (out.loss_sum / 24).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    unseen = objective.loss(coloured_batch(99), 0)
    assert float(unseen.metrics["accuracy"]) / 24 > 0.9  # chance: 0.33
    objective.export(tmp_path)
    representation = dataclasses.replace(VIT, weights=str(tmp_path / "model.safetensors"))
    autoencoder = dataclasses.replace(PLAIN, representation=representation)
    pivot = build_stage(dataclasses.replace(PIVOT, autoencoder=autoencoder, discriminator=None))
    image = coloured_batch(0).pixels_01
    assert torch.equal(pivot.model.features(image), objective.model.representation(image))


@pytest.mark.parametrize("label", [None, 3, -1, "1"])
def test_stand_in_refuses_a_wrong_label(label: Any) -> None:
    objective = IdentityObjective(StandInConfig(VIT, num_classes=3))
    wrong = dataclasses.replace(pixel_batch(1), meta=({"label": label},))
    with pytest.raises(UserError, match=r"sample '0': json needs \"label\""):
        objective.loss(wrong, 0)


def test_stand_in_starts_from_scratch() -> None:
    with pytest.raises(ConfigError, match="trained from scratch"):
        StandInConfig(dataclasses.replace(VIT, weights="pretrained"), num_classes=3)


@pytest.mark.parametrize("change", ["width=0", "heads=0", "heads=-1", "mlp_width=-1"])
def test_sizes_that_make_no_decoder_are_one_line(change: str) -> None:
    path = Path(__file__).parents[4] / "configs" / "quickstart" / "pivot.yaml"
    with pytest.raises(ConfigError, match=r"decoder: .*give at least 1|nothing can be built") as error:
        build_untrained(load(TokenizerRun, path, [f"stage.autoencoder.decoder.{change}"]).stage)
    assert "\n" not in str(error.value)
