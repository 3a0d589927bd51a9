"""Imports Bagel's published checkpoints, and exports ours for Bagel's code, by a mapping of parameter names.

Source: ByteDance-Seed/Bagel, modeling/bagel/{bagel,qwen2_navit}.py. A Bagel folder holds ema.safetensors (or
model.safetensors) and llm_config.json. The published model also sees images through a vision transformer; that part
is left out, as this model has none.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from base.config import UserError
from base.files import write_json
from data.shards import LatentInfo
from generator.config import GeneratorConfig
from generator.embeddings import grid_sinusoids
from generator.import_result import ImportedGenerator
from generator.model import Generator
from generator.qwen import qwen_shape
from tokenizer.releases.import_result import shapes
from tokenizer.releases.renaming import Translation, check
from tokenizer.weights import read_tensors, save, shapes_only

WEIGHTS = ("ema.safetensors", "model.safetensors")
"""File names in the order of search. Bagel's authors evaluate the averaged weights (ema)."""
LLM_CONFIG = "llm_config.json"
POSITIONS = "latent_pos_embed.pos_embed"
EMBEDDING, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
UNDERSTANDING_OF_IMAGES = ("vit_model.", "connector.", "vit_pos_embed.")
_SUFFIX = {"understanding": "", "generation": "_moe_gen"}
_ENDS = {
    "latent_embedding.latent_in.": "vae2llm.",
    "latent_embedding.time_embedding.mlp.": "time_embedder.mlp.",
    "latent_out.": "llm2vae.",
    "lm_head.": "language_model.lm_head.",
    "backbone.embed_tokens.": "language_model.model.embed_tokens.",
    "backbone.understanding_norm.": "language_model.model.norm.",
    "backbone.generation_norm.": "language_model.model.norm_moe_gen.",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
_TOLERANCE = 1e-5
"""Tolerance for Bagel's stored position table: its float32 sines are of float64 angles, ours of float32 angles."""


def bagel_name(ours: str) -> str:
    """Bagel's name of our parameter `ours`."""
    for start, theirs in _ENDS.items():
        if ours.startswith(start):
            return theirs + ours.removeprefix(start)
    backbone, layers, index, expert, rest = ours.split(".", 4)
    assert (backbone, layers) == ("backbone", "layers"), ours
    module, _, path = rest.partition(".")
    place = "self_attn." if module in _ATTENTION else ""
    return f"language_model.model.layers.{index}.{place}{module}{_SUFFIX[expert]}.{path}"


def import_bagel(folder: Path, latents: LatentInfo) -> ImportedGenerator[Generator]:
    """Reads a Bagel folder. `latents` describes what the generator will draw; its channels must be the checkpoint's.

    An LM head that differs from the embedding is kept as a separate matrix. Raises UserError: a missing or damaged
    file, another kind of language model, positions that are not the fixed table.
    """
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            f"{folder}: has neither {' nor '.join(WEIGHTS)}; give the folder of a Bagel checkpoint"
        )
    theirs = read_tensors(path)
    positions = theirs.pop(POSITIONS, None)
    if positions is None:
        raise UserError(f"{path}: has no {POSITIONS}; give a Bagel checkpoint that generates images")
    tied = LM_HEAD not in theirs or torch.equal(theirs[LM_HEAD], theirs.get(EMBEDDING, theirs[LM_HEAD][:0]))
    if tied:
        theirs.pop(LM_HEAD, None)
    backbone = dataclasses.replace(
        qwen_shape(folder / LLM_CONFIG), qk_norm=any(name.endswith("q_norm.weight") for name in theirs)
    )
    side = math.isqrt(len(positions))
    config = GeneratorConfig(backbone, side, text_output=True, tied_text_output=tied)
    _check_positions(positions, side, backbone.width, where=str(path))
    with shapes_only():
        ours = shapes(Generator(config, latents))
    sources = {name: (bagel_name(name),) for name in ours if bagel_name(name) in theirs}
    used = {name for names in sources.values() for name in names}
    rest = [name for name in theirs if name not in used]
    left_out = tuple(name for name in rest if name.startswith(UNDERSTANDING_OF_IMAGES))
    unknown = tuple(name for name in rest if name not in left_out)
    translation = Translation(sources, left_out, unknown)
    report = check(translation, {name: tuple(tensor.shape) for name, tensor in theirs.items()}, ours)
    notes = [f"{POSITIONS}: the fixed table of {side} x {side} places, computed here"]
    notes += ["the LM head is the text embedding" if tied else "the LM head is kept as a matrix of its own"]
    report = dataclasses.replace(report, notes=tuple(notes))
    tensors = {} if report.problems else translation.assemble(theirs, ours)
    return ImportedGenerator(report, "generator", partial(Generator.uninitialised, config, latents), tensors)


def export_bagel(model: Generator, folder: Path) -> None:
    """Writes ema.safetensors and llm_config.json for Bagel's code into an existing folder.

    Raises UserError: a DDT head, which Bagel's code does not know.
    """
    if model.head is not None:
        raise UserError("Bagel's code knows no DDT head; export a generator without one")
    tensors = {bagel_name(name): tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    # Bagel's code always builds an LM head. A tied head is copied, because safetensors stores no shared tensors.
    tensors.setdefault(LM_HEAD, tensors[EMBEDDING].clone())
    places = torch.arange(model.config.max_side**2)
    width, period = model.config.backbone.width, model.config.position_max_period
    tensors[POSITIONS] = grid_sinusoids(places, model.config.max_side, width, period)
    save(tensors, folder / WEIGHTS[0])
    write_json(folder / LLM_CONFIG, _llm_config(model))


def _llm_config(model: Generator) -> dict[str, Any]:
    backbone = model.config.backbone
    if backbone.head_dim * backbone.num_heads != backbone.width or not backbone.qkv_bias:
        raise UserError("Bagel's code knows Qwen2's attention only: width = heads x head_dim, with biases")
    return {
        "model_type": "qwen2",
        "vocab_size": backbone.vocab_size,
        "hidden_size": backbone.width,
        "intermediate_size": backbone.mlp_width,
        "num_hidden_layers": backbone.num_layers,
        "num_attention_heads": backbone.num_heads,
        "num_key_value_heads": backbone.num_kv_heads,
        "rms_norm_eps": backbone.norm_eps,
        "rope_theta": backbone.rope_theta,
        "hidden_act": "silu",
        "qk_norm": backbone.qk_norm,
        "layer_module": "Qwen2MoTDecoderLayer",
        "tie_word_embeddings": False,
    }


def _check_positions(positions: Tensor, side: int, width: int, where: str) -> None:
    if side * side != len(positions) or positions.shape[1] != width:
        raise UserError(
            f"{where}: {POSITIONS} has shape {list(positions.shape)}, not a square grid of width {width}"
        )
    difference = (
        (positions.float() - grid_sinusoids(torch.arange(side * side), side, width)).abs().max().item()
    )
    if difference > max(_TOLERANCE, torch.finfo(positions.dtype).eps):
        raise UserError(
            f"{where}: {POSITIONS} differs from the fixed sin-cos table by {difference:.1e}; this model computes its "
            "positions and cannot take learned ones"
        )
