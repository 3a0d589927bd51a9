"""Qwen2, Qwen2.5 and dense Qwen3 checkpoints -> both experts of the mixture of transformers.

Weights are read from the safetensors files themselves, and config.json in the layouts of transformers 4
(`rope_theta`) and 5 (`rope_parameters`): no model class of any transformers version is involved.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from base import hub
from base.config import UserError, from_dict
from base.files import read_object
from generator.config import MotConfig
from generator.mot import Mot
from tokenizer.weights import load_exact, read_tensors

QWEN2_5_0_5B = MotConfig(
    vocab_size=151_936,
    width=896,
    num_layers=24,
    num_heads=14,
    num_kv_heads=2,
    head_dim=64,
    mlp_width=4864,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=True,
    qk_norm=True,
)
"""Qwen2.5-0.5B with Bagel's QK-norm: the paper's text-to-image backbone."""

EXPERTS = ("understanding", "generation")
UNUSED = {"rotary_emb.inv_freq": "computed from rope_theta"}
"""Checkpoint tensors (by the end of their name) that the model does not need, each with the reason."""
LM_HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ADDED = ("q_norm.weight", "k_norm.weight")
"""Our parameters that Qwen2 lacks (Bagel's QK-norm) and Qwen3 has. Those that a checkpoint lacks start at one."""
BIASED = {"qwen2": True, "qwen3": False}
"""Dense Qwens that fit our experts -> whether q, k and v have biases if the config does not say."""


def load_qwen(model: Mot, source: str) -> Tensor | None:
    """Starts both experts and the text embedding from one Qwen2, Qwen2.5 or dense Qwen3 checkpoint, in place.

    `source`: a folder with config.json and safetensors, or a Hugging Face name. Every tensor is used, listed in UNUSED
    or returned. Returns the LM head [vocab_size, width], None if it is tied to the text embedding. Raises UserError: no
    such checkpoint, another kind of model, another shape.
    """
    folder = hub.folder(source, ["config.json", "*.safetensors", "*.safetensors.index.json"])
    shape = qwen_shape(folder / "config.json")
    for field in dataclasses.fields(MotConfig):
        found, wanted = getattr(shape, field.name), getattr(model.config, field.name)
        if field.name != "qk_norm" and found != wanted:
            raise UserError(
                f"{folder}: {field.name} is {found}, the config says {wanted}; set backbone.{field.name}"
            )
    found_tensors = _read_checkpoint(folder)
    lm_head = found_tensors.pop(LM_HEAD, None)
    if lm_head is not None and torch.equal(lm_head, found_tensors.get(EMBEDDING, lm_head[:0])):
        lm_head = None
    tensors = {target: tensor for name, tensor in found_tensors.items() for target in _targets(name)}
    for name, parameter in model.named_parameters():
        if name.endswith(ADDED) and name not in tensors:
            tensors[name] = torch.ones_like(parameter)
    load_exact(model, tensors, where=str(folder))
    return lm_head


def qwen_shape(path: Path) -> MotConfig:
    """The shape that a checkpoint's config.json (Bagel: llm_config.json) describes, with Bagel's QK-norm on."""
    if not path.exists():
        raise UserError(f"{path}: no such file; give the folder of a checkpoint that has it")
    config = read_object(path)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(
            f"{path}: its RoPE is {rope!r}; only plain Qwen2, Qwen2.5 and dense Qwen3 weights fit"
        )
    kind = rope.get("rope_type", rope.get("type", "default"))
    model_type = str(config.get("model_type"))
    if model_type not in BIASED or kind != "default" or config.get("use_sliding_window"):
        raise UserError(
            f"{path}: model_type {model_type!r}, RoPE {kind!r}, sliding window "
            f"{bool(config.get('use_sliding_window'))}; only plain Qwen2, Qwen2.5 and dense Qwen3 weights fit"
        )
    fields = {
        "vocab_size": config.get("vocab_size"),
        "width": config.get("hidden_size"),
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": config.get("num_attention_heads"),
        "num_kv_heads": config.get("num_key_value_heads"),
        "head_dim": config.get("head_dim"),
        "mlp_width": config.get("intermediate_size"),
        "rope_theta": rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
        "norm_eps": config.get("rms_norm_eps"),
        "qkv_bias": config.get("attention_bias", BIASED[model_type]),
        "qk_norm": True,
    }
    width, heads = fields["width"], fields["num_heads"]
    if not fields["head_dim"] and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        fields["head_dim"] = width // heads
    return from_dict(MotConfig, fields, where=str(path))


def _read_checkpoint(folder: Path) -> dict[str, Tensor]:
    """All tensors of `model.safetensors`, or of the files that `model.safetensors.index.json` names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise UserError(f"{index}: has no weight_map from names to files; fetch it again")
        names = sorted({Path(name).name for name in weight_map.values()})  # only names in this folder
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors.update(read_tensors(folder / name))
    return tensors


def _targets(name: str) -> list[str]:
    """Our names for one Qwen2 tensor. An unknown name is kept, so that the copy refuses it."""
    if any(name.endswith(ending) for ending in UNUSED):
        return []
    path = name.removeprefix("model.")
    if path == "norm.weight":
        return [f"{expert}_norm.weight" for expert in EXPERTS]
    if path.startswith("layers."):
        _, index, rest = path.split(".", 2)
        return [f"layers.{index}.{expert}.{rest.removeprefix('self_attn.')}" for expert in EXPERTS]
    return [path]
