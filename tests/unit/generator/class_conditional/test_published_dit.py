"""Published class-conditional checkpoints become exports; every tensor is accounted for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from base.config import UserError
from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig, WideHeadConfig
from generator.class_conditional.layers import rope_2d
from generator.class_conditional.model import create_generator, load_generator
from generator.class_conditional.published import import_dit

LATENTS = LatentInfo("fp32", (6, 4, 4), (0.0,) * 6, (1.0,) * 6, "autoencoder", "")
CONFIGS = {
    "lightning": DitConfig(3, 48, 2, 3),
    "patches": DitConfig(3, 48, 2, 3, patch=2, qk_norm=False),
    "wide head": DitConfig(3, 48, 2, 3, qk_norm=False, head=WideHeadConfig(64, 2, 4)),
}


def published(config: DitConfig) -> dict[str, Tensor]:
    """As their training writes it: wrapped, with the rotary tables that their modules keep."""
    model = create_generator(config, LATENTS, seed=4)
    tensors = {f"module.{name}": value.detach() for name, value in model.state_dict().items()}
    parts = {"feat_rope": (config.width, config.num_heads)}
    if config.head is not None:
        parts = {
            "enc_feat_rope": parts["feat_rope"],
            "dec_feat_rope": (config.head.width, config.head.num_heads),
        }
    for name, (width, heads) in parts.items():
        tables = rope_2d(model.grid, width // heads, torch.device("cpu"))
        for table, values in zip(("freqs_cos", "freqs_sin"), tables, strict=True):
            tensors[f"module.{name}.{table}"] = values.repeat_interleave(2, dim=1)
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_becomes_an_export_of_its_shape(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    torch.save({"ema": published(config), "step": 7}, tmp_path / "model.pt")
    imported = import_dit(tmp_path / "model.pt", LATENTS)
    assert imported.report.problems == ()
    (tmp_path / "export").mkdir()
    imported.write(tmp_path / "export")
    loaded = load_generator(tmp_path / "export")
    assert loaded.config == config and loaded.latents == LATENTS
    expected = create_generator(config, LATENTS, seed=4).state_dict()
    for key, value in loaded.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)  # a copy


def test_the_published_names_and_shapes_of_a_tiny_model_are_ours(tmp_path: Path) -> None:
    """tests/golden: read from the published code; names beside parameters are the fixed tables."""
    golden = json.loads((Path(__file__).parents[3] / "golden" / "dit_forward.json").read_text())
    for theirs in golden.values():
        tensors = {name: torch.zeros(shape) for name, shape in theirs["parameters"].items()}
        save_file(tensors, str(tmp_path / "model.safetensors"))
        with pytest.raises(UserError, match="not the fixed table"):  # names and shapes fit, the zeros do not
            import_dit(tmp_path / "model.safetensors", LATENTS)


def test_left_over_tensors_are_named_on_both_sides(tmp_path: Path) -> None:
    tensors = published(CONFIGS["lightning"])
    tensors["module.extra"] = torch.zeros(2)
    del tensors["module.blocks.1.mlp.w3.bias"]
    torch.save(tensors, tmp_path / "model.pt")
    problems = import_dit(tmp_path / "model.pt", LATENTS).report.problems
    assert len(problems) == 2 and "extra" in problems[0] and "blocks.1.mlp.w3.bias" in problems[1]


def test_a_checkpoint_with_other_times_is_refused_in_one_line(tmp_path: Path) -> None:
    tensors = published(CONFIGS["lightning"])
    del tensors["module.t_embedder.W"]
    torch.save(tensors, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"t_embedder\.W; give a LightningDiT or DiTDH"):
        import_dit(tmp_path / "model.pt", LATENTS)
