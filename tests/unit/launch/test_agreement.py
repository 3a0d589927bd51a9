"""Settings of several sections that must agree are compared when a config is read, --dry-run included."""

import json
from pathlib import Path

import pytest

from base.config import ConfigError, load, to_dict
from launch.runs.configs import ClassRun, GeneratorRun, TokenizerRun
from quickstart.train_standin import StandInRun
from tokenizer.config import FORMAT_VERSION

CONFIGS = Path(__file__).parents[3] / "configs"
ALIGNED = "{layer: 99}"
PAIRS = {
    "pixels.image_px, stage.autoencoder": (
        TokenizerRun, "quickstart/pivot.yaml", ["pixels.image_px=128", "pixels.resize_px=null"],
    ),
    "pixels.image_px, standin.representation.input_px": (
        StandInRun, "quickstart/standin.yaml", ["pixels.image_px=128", "pixels.resize_px=null"],
    ),
    "resize_px = 100, image_px = 256": (TokenizerRun, "tokenizer/pivot.yaml", ["pixels.resize_px=100"]),
    "stage.discriminator, engine.adversary_optimizer": (
        TokenizerRun, "tokenizer/pivot.yaml", ["engine.adversary_optimizer=null"],
    ),
    "stage.discriminator, engine.zero_stage": (
        TokenizerRun, "tokenizer/pivot.yaml", ["engine.zero_stage=3", "stage.adaptive_pivot=false"],
    ),
    "stage.adaptive_pivot, engine.zero_stage": (
        TokenizerRun, "tokenizer/pivot.yaml", ["engine.zero_stage=3", "stage.discriminator=null"],
    ),
    "gan_loss_start_step, gan_update_start_step": (
        TokenizerRun, "tokenizer/pivot.yaml", ["stage.gan_loss_start_step=15000"],
    ),
    "packing.max_side, generator.max_side": (
        GeneratorRun, "generator/t2i_cc12m.yaml", ["packing.max_side=32"],
    ),
    "flow.text_loss_weight, generator.text_output": (
        GeneratorRun, "generator/edit_omniedit.yaml", ["flow.text_loss_weight=0.1"],
    ),
    "generator.text_output, flow.text_loss_weight": (
        GeneratorRun, "generator/edit_omniedit.yaml", ["generator.text_output=true"],
    ),
    "evaluation, autoencoder": (
        GeneratorRun,
        "generator/t2i_cc12m.yaml",
        ["autoencoder=null", "evaluation={every_steps: 5, prompts: a.jsonl, suites: {generation: {reference: a.npz}}}"],
    ),
    "flow.align.layer, generator.num_layers": (
        ClassRun, "generator/class/rpiae64_80.yaml", [f"flow.align={ALIGNED}"],
    ),
    "decay_end_step, decay_start_step": (
        TokenizerRun, "tokenizer/bridge.yaml", ["engine.optimizer.decay_end_step=10"],
    ),
    "num_heads, num_kv_heads": (
        GeneratorRun, "generator/t2i_cc12m.yaml", ["generator.backbone.num_kv_heads=3"],
    ),
    "export_at_steps, 200000": (GeneratorRun, "generator/t2i_cc12m.yaml", ["engine.export_at_steps=[300000]"]),
    "grad_clip, Muon": (GeneratorRun, "generator/t2i_cc12m.yaml", ["engine.optimizer.name=muon"]),
    "roll_back, keep_checkpoints": (
        GeneratorRun, "generator/t2i_cc12m.yaml", ["engine.on_alarm=roll_back", "engine.keep_checkpoints=1"],
    ),
}  # fmt: skip
"""What the message must name, both of them -> the config that breaks it, and how."""


@pytest.mark.parametrize("names", PAIRS, ids=str)
def test_settings_that_do_not_agree_are_refused_naming_both(names: str) -> None:
    run, path, overrides = PAIRS[names]
    load(run, CONFIGS / path)
    with pytest.raises(ConfigError) as error:
        load(run, CONFIGS / path, overrides)
    assert "\n" not in str(error.value)
    for name in names.split(", "):
        assert name in str(error.value)


def test_an_export_of_another_size_is_refused_when_the_config_is_read(tmp_path: Path) -> None:
    pivot = load(TokenizerRun, CONFIGS / "quickstart/pivot.yaml")
    tree = {"format_version": FORMAT_VERSION, "autoencoder": to_dict(pivot.stage.autoencoder)}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    start = f"stage.init_from={tmp_path}"
    with pytest.raises(ConfigError, match=r"pixels.image_px is 999, image_px of .* make them equal"):
        load(
            TokenizerRun,
            CONFIGS / "quickstart/bridge.yaml",
            [start, "pixels.image_px=999", "pixels.resize_px=null"],
        )


@pytest.mark.parametrize(
    ("key", "suggestion"),
    [
        ("generator.widht", "generator.backbone.width"),
        ("generator.backbone.widht", "generator.backbone.width"),
        ("engine.lr", "engine.optimizer.lr"),
        ("engin", "engine"),
        ("steps", "engine.steps"),
        ("packing.token_per_pack", "packing.tokens_per_pack"),
        ("engine.optimizer.learing_rate", "engine.optimizer.lr"),
        ("engine.max_steps", "engine.steps"),
    ],
)
def test_a_mistyped_key_is_met_with_the_one_that_was_meant(key: str, suggestion: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(GeneratorRun, CONFIGS / "generator/t2i_cc12m.yaml", [f"{key}=3"])
    assert f"did you mean '{suggestion}'?" in str(error.value)
