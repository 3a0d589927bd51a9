"""Imports the authors' RPiAE checkpoints and RAE's decoders as an Autoencoder.

Both projects share the decoder's layout and names (transformers' ViTMAE). RPiAE's file has all parts; RAE
publishes the decoder alone, as its encoder is the library's own model.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import torch
from torch import Tensor

from base import files
from base.config import ConfigError, UserError
from tokenizer.config import (
    AutoencoderConfig,
    BridgeConfig,
    PixelDecoderConfig,
    RepresentationConfig,
    without_download,
)
from tokenizer.pixel_decoder import PixelDecoder, sincos_positions
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.releases.import_result import Imported, shapes
from tokenizer.releases.renaming import Rule, Shapes, check, modules, translate
from tokenizer.rpiae import Autoencoder
from tokenizer.weights import load_exact, shapes_only

RAE = AutoencoderConfig(
    representation=RepresentationConfig("dinov2-b-reg", library="transformers"),
    decoder=PixelDecoderConfig(),
    image_px=256,
)
"""RAE's config: DINOv2-B with registers and ViT-XL."""
RPIAE = dataclasses.replace(RAE, bridge=BridgeConfig())
"""The released RPiAE's config: RAE's with a bridge to 64 channels."""

ENCODER = "encoder.vit."
"""Where Representation keeps the library's module."""
POSITIONS = "decoder.positions"
"""The decoder's position table. Their files store it and our decoder computes it, so it is compared, not loaded."""
CLASS_TOKEN = "decoder.class_token"  # noqa: S105  # a tensor's name
POSITIONS_TOLERANCE = 4e-3
"""Half a unit of bf16 at 1. A table in another order is off by 1."""

_DECODER = r"(?:decoder\.)?"  # RAE's files name parameters from the decoder down
_KIND = r"(?P<kind>weight|bias)"
_LAYER = r"(?P<layer>\d+)\."


def _fused(theirs: str, ours: str, names: tuple[str, str, str]) -> list[Rule]:
    """Rules that stack their modules query, key and value into one of ours."""
    return [Rule(theirs + name + rf"\.{_KIND}", rf"{ours}.\g<kind>", part) for part, name in enumerate(names)]


_ENCODER_LAYER = r"encoder\.encoder\.(?P<layer>.*)\.attention\."
_BRIDGE_LAYER = r"vb_feature_decoder\.net\." + _LAYER
_DECODER_LAYER = _DECODER + r"decoder_layers\." + _LAYER

RULES: tuple[Rule, ...] = (
    # Files written with transformers 4 have that version's names of the attention.
    *modules(
        _ENCODER_LAYER,
        ENCODER + r"\g<layer>.attention.",
        {
            "attention.query": "q_proj",
            "attention.key": "k_proj",
            "attention.value": "v_proj",
            "output.dense": "o_proj",
        },
    ),
    Rule(r"encoder\.encoder\.(.*)", ENCODER + r"\1"),
    Rule(rf"vb_feature_encoder\.attn\.in_proj_{_KIND}", r"bridge.encoder.attention.qkv.\g<kind>"),
    *modules(
        r"vb_feature_encoder\.",
        "bridge.encoder.",
        {
            "norm1": "attention_norm",
            "attn.out_proj": "attention.out",
            "skip_proj": "skip",
            "norm2": "mlp_norm",
            "proj2.0": "mlp.up",
            "proj2.3": "mlp.down",
            "to_moments": "to_moments",
        },
    ),
    Rule(
        rf"{_BRIDGE_LAYER}self_attn\.in_proj_{_KIND}",
        r"bridge.decoder.layers.\g<layer>.attention.qkv.\g<kind>",
    ),
    *modules(
        _BRIDGE_LAYER,
        r"bridge.decoder.layers.\g<layer>.",
        {
            "norm1": "attention_norm",
            "self_attn.out_proj": "attention.out",
            "norm2": "mlp_norm",
            "linear1": "mlp.up",
            "linear2": "mlp.down",
        },
    ),
    *modules(r"vb_feature_decoder\.", "bridge.decoder.", {"in_proj": "embed", "out_proj": "out"}),
    *_fused(
        _DECODER_LAYER + r"attention\.attention\.",
        r"decoder.layers.\g<layer>.attention.qkv",
        ("query", "key", "value"),
    ),
    *modules(
        _DECODER_LAYER,
        r"decoder.layers.\g<layer>.",
        {
            "attention.output.dense": "attention.out",
            "intermediate.dense": "mlp.up",
            "output.dense": "mlp.down",
            "layernorm_before": "attention_norm",
            "layernorm_after": "mlp_norm",
        },
    ),
    *modules(
        _DECODER, "decoder.", {"decoder_embed": "embed", "decoder_norm": "norm", "decoder_pred": "to_pixels"}
    ),
    Rule(_DECODER + "trainable_cls_token", CLASS_TOKEN),
    Rule(_DECODER + "decoder_pos_embed", POSITIONS),
)


def wanted_shapes(config: AutoencoderConfig) -> Shapes:
    """Shapes of every tensor that a file must hold for `config`, the position table included. Allocates nothing."""
    if config.decoder.kind != "vit":
        raise ConfigError(f"decoder.kind is {config.decoder.kind}: RPiAE and RAE release vit decoders")
    with shapes_only():
        model = Autoencoder(without_download(config))
    assert isinstance(model.decoder, PixelDecoder)
    return {**shapes(model), POSITIONS: tuple(model.decoder.positions.shape)}


def import_rpiae(path: str | Path, config: AutoencoderConfig = RPIAE) -> Imported:
    """Reads a checkpoint of RPiAE or, for a config without a bridge, of RAE, whose decoder suffices.

    The shapes do not tell the number of heads: `config` must state it. Raises UserError: an unreadable file, another
    position table; and, when the autoencoder is built, an encoder that cannot be downloaded.
    """
    checkpoint = read_checkpoint(path)
    translation = translate(checkpoint.tensors, RULES)
    ours = wanted_shapes(config)
    decoder_only = config.bridge is None and not any(name.startswith(ENCODER) for name in translation.sources)
    notes: tuple[str, ...] = ()
    if decoder_only:
        ours = {name: shape for name, shape in ours.items() if name.startswith("decoder.")}
        notes = (f"encoder: {config.representation.name}, weights: {config.representation.weights}",)
        if CLASS_TOKEN not in translation.sources:
            del ours[CLASS_TOKEN]
            notes += ("decoder.class_token is not in the file: zero, which RAE's code starts it with",)
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    report = dataclasses.replace(check(translation, theirs, ours), notes=notes)
    if not report.problems:
        _compare_positions(checkpoint.tensors[translation.sources[POSITIONS][0]], checkpoint.where)

    def build() -> Autoencoder:
        tensors = translation.assemble(checkpoint.tensors, ours)
        del tensors[POSITIONS]
        model = Autoencoder(config if decoder_only else without_download(config))
        if decoder_only:
            zero = {CLASS_TOKEN: torch.zeros(1, 1, config.decoder.width)}
            tensors = {**model.state_dict(), **zero, **tensors}
        load_exact(model, tensors, checkpoint.where)
        return model.eval()

    return Imported(report, {"imported": {"from": checkpoint.where, "sha256": files.sha256(path)}}, build)


def _compare_positions(theirs: Tensor, where: str) -> None:
    """Raises UserError where their table, [1, 1 + side * side, W], differs from the computed one."""
    side = math.isqrt(theirs.shape[1] - 1)
    difference = float((theirs.float() - sincos_positions(theirs.shape[2], (side, side))).abs().max())
    if difference > POSITIONS_TOLERANCE:
        raise UserError(
            f"{where}: its decoder_pos_embed differs from the 2-D sin-cos table by {difference:.3g}; "
            "this decoder has no other positions"
        )
