"""Imports published LightningDiT and DiTDH checkpoints (RPiAE's, RAE's).

Names are equal (generator/class_conditional/model.py). The shape is read from the tensors. The fixed tables of
positions and rotations are compared with ours. LightningDiT's own first checkpoints (hustvl/LightningDiT) embed time
differently and count it from the other end: the names of their time embedding tell them apart, and they are refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from base.config import UserError
from data.shards import LatentInfo
from generator.class_conditional.config import DitConfig, WideHeadConfig
from generator.class_conditional.layers import position_table, rope_2d
from generator.class_conditional.model import ClassGenerator, new_generator, uninitialised
from generator.import_result import ImportedGenerator
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.releases.import_result import shapes
from tokenizer.releases.renaming import Translation, check
from tokenizer.weights import shapes_only

ROPES = {"feat_rope": "backbone", "enc_feat_rope": "backbone", "dec_feat_rope": "head"}
TABLES = ("freqs_cos", "freqs_sin")
TOLERANCE = 1e-4
"""Tolerance for the stored tables, whose sines are of angles in another precision."""


def import_dit(source: str | Path, latents: LatentInfo) -> ImportedGenerator[ClassGenerator]:
    """Reads a checkpoint. `latents` describes what the generator draws (a latent data set's manifest).

    Raises UserError: no such checkpoint, a number of heads that no tensor shows, tables that are not the fixed ones.
    """
    stored = read_checkpoint(source)
    tensors = dict(stored.tensors)
    ropes = {
        part: [tensors.pop(f"{name}.{table}") for table in TABLES]
        for name, part in ROPES.items()
        if f"{name}.{TABLES[0]}" in tensors
    }
    config = _shape(tensors, ropes, stored.where)
    with shapes_only():
        model = new_generator(config, latents)
    ours = shapes(model)
    translation = Translation(
        sources={name: (name,) for name in ours if name in tensors},
        left_out=(),
        unknown=tuple(name for name in tensors if name not in ours),
    )
    report = check(translation, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, ours)
    if not report.problems:
        _check_tables(tensors["pos_embed"], ropes, config, model.grid, stored.where)
    notes = (
        f"{config.num_layers} layers of width {config.width}, {config.num_heads} heads; head {config.head}",
    )
    filled = {} if report.problems else {name: tensors[name].float() for name in ours}
    return ImportedGenerator(
        dataclasses.replace(report, notes=notes),
        "class-conditional generator",
        partial(uninitialised, config, latents),
        filled,
    )


def _shape(tensors: Mapping[str, Tensor], ropes: Mapping[str, list[Tensor]], where: str) -> DitConfig:
    needed = ("x_embedder.proj.weight", "y_embedder.embedding_table.weight", "pos_embed", "t_embedder.W")
    for name in needed:
        if name not in tensors:
            raise UserError(
                f"{where}: has no {name}; give a LightningDiT or DiTDH checkpoint of RPiAE or RAE"
            )
    widths: list[int] = []
    while (weight := tensors.get(f"blocks.{len(widths)}.attn.proj.weight")) is not None:
        widths.append(len(weight))
    has_head = "s_embedder.proj.weight" in tensors
    width = tensors["pos_embed"].shape[-1]
    num_layers = len(widths)
    head = None
    if has_head:
        head_width = len(tensors["x_embedder.proj.weight"])
        # With equal widths no tensor tells the two stacks apart; RAE's head has two layers.
        num_head_layers = widths.count(head_width) if head_width != width else WideHeadConfig.num_layers
        num_layers -= num_head_layers
        heads = _num_heads(tensors, ropes, "head", head_width, num_layers, where)
        head = WideHeadConfig(head_width, num_head_layers, heads)
    return DitConfig(
        num_classes=len(tensors["y_embedder.embedding_table.weight"]) - 1,
        width=width,
        num_layers=num_layers,
        num_heads=_num_heads(tensors, ropes, "backbone", width, 0, where),
        patch=tensors["x_embedder.proj.weight"].shape[-1],
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        head=head,
    )


def _num_heads(
    tensors: Mapping[str, Tensor],
    ropes: Mapping[str, list[Tensor]],
    part: str,
    width: int,
    block: int,
    where: str,
) -> int:
    """The number of heads, from the width of one head, which the rotary table or a QK-norm shows."""
    norm = tensors.get(f"blocks.{block}.attn.q_norm.weight")
    if part in ropes:
        return width // ropes[part][0].shape[-1]
    if norm is None:
        raise UserError(
            f"{where}: neither rotary tables nor QK-norms, which tell the number of heads; give the whole checkpoint"
        )
    return width // len(norm)


def _check_tables(
    positions: Tensor, ropes: Mapping[str, list[Tensor]], config: DitConfig, grid: tuple[int, int], where: str
) -> None:
    pairs = [(positions, position_table(grid, config.width), "pos_embed")]
    for part, tables in ropes.items():
        shape = config if part == "backbone" else config.head
        assert shape is not None
        fixed = rope_2d(grid, shape.width // shape.num_heads, torch.device("cpu"))
        pairs += [
            (theirs, ours.repeat_interleave(2, dim=1), f"rotary table of the {part}")
            for theirs, ours in zip(tables, fixed, strict=True)
        ]
    for theirs, ours, name in pairs:
        tolerance = max(TOLERANCE, torch.finfo(theirs.dtype).eps)
        if theirs.shape != ours.shape or (theirs.float() - ours).abs().max() > tolerance:
            raise UserError(
                f"{where}: its {name} is not the fixed table of a grid {grid[0]}x{grid[1]}; give latents of its grid"
            )
