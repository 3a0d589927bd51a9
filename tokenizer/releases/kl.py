"""Published convolutional VAEs -> KlAutoencoder: diffusers folders (SD-VAE, Flux-VAE), LDM checkpoints (VA-VAE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from base import files, hub
from base.config import UserError, describing, from_dict
from tokenizer.kl import KlAutoencoder, KlConfig
from tokenizer.releases.checkpoint import Checkpoint, read_checkpoint
from tokenizer.releases.import_result import Imported, shapes
from tokenizer.releases.renaming import Rule, check, modules, translate
from tokenizer.weights import load_exact, shapes_only

DIFFUSERS_CONFIG = "config.json"
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
LDM_CHANNELS = (128, 128, 256, 256, 512)
"""VA-VAE (LightningDiT): base 128, multipliers 1, 1, 2, 2, 4, 2 blocks a level, attention at 16x16."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
DIFFUSERS_RULES: tuple[Rule, ...] = (
    # Names that diffusers wrote before version 0.18, in SD-VAE's files too.
    *modules(r"(?P<place>.*\.attentions\.\d+)\.", r"vae.\g<place>.", _OLD_ATTENTION),
    Rule(r"(.*)", r"vae.\1"),
)
_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_BLOCK = {name: name for name in ("norm1", "conv1", "norm2", "conv2")} | {"nin_shortcut": "conv_shortcut"}
_RESAMPLING = {"downsample.conv": "downsamplers.0.conv", "upsample.conv": "upsamplers.0.conv"}
_ENDS = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}


def ldm_rules(num_levels: int) -> list[Rule]:
    """Rules from LDM's names to diffusers', below `vae.`. LDM counts the decoder's levels from the finest, diffusers
    from the coarsest."""
    rules = [Rule(r"(?:loss|foundation_model|linear_proj)\..*", None)]
    for level in range(num_levels):
        places = {
            rf"encoder\.down\.{level}\.": f"vae.encoder.down_blocks.{level}.",
            rf"decoder\.up\.{level}\.": f"vae.decoder.up_blocks.{num_levels - 1 - level}.",
        }
        for theirs, ours in places.items():
            rules += modules(rf"{theirs}block\.(?P<i>\d+)\.", rf"{ours}resnets.\g<i>.", _BLOCK)
            rules += modules(rf"{theirs}attn\.(?P<i>\d+)\.", rf"{ours}attentions.\g<i>.", _ATTENTION)
            rules += modules(theirs, ours, _RESAMPLING)
    for side in ("encoder", "decoder"):
        rules += modules(rf"{side}\.mid\.block_1\.", f"vae.{side}.mid_block.resnets.0.", _BLOCK)
        rules += modules(rf"{side}\.mid\.attn_1\.", f"vae.{side}.mid_block.attentions.0.", _ATTENTION)
        rules += modules(rf"{side}\.mid\.block_2\.", f"vae.{side}.mid_block.resnets.1.", _BLOCK)
        rules += modules(rf"{side}\.", f"vae.{side}.", _ENDS)
    return [*rules, *modules("", "vae.", {name: name for name in ("quant_conv", "post_quant_conv")})]


def import_va_vae(path: str | Path, image_px: int) -> Imported:
    """Imports LightningDiT's VA-VAE from its .pt file; the number of latent channels is read from the weights.

    Raises UserError: an unreadable file, or one without quant_conv.
    """
    checkpoint = read_checkpoint(path)
    quant_conv = checkpoint.tensors.get("quant_conv.weight")
    if quant_conv is None:
        raise UserError(f"{checkpoint.where}: has no quant_conv.weight; give VA-VAE's checkpoint")
    config = KlConfig(image_px, len(quant_conv) // 2, LDM_CHANNELS, coarsest_attention=True)
    return _import(checkpoint, config, ldm_rules(len(LDM_CHANNELS)), files.sha256(path))


def import_diffusers(source: str, image_px: int, subfolder: str | None = None) -> Imported:
    """Imports an AutoencoderKL of diffusers from a folder or the hub; `subfolder` is "vae" inside a pipeline.

    Raises UserError: no such folder or repository, weights that are not in safetensors, an unsupported architecture.
    """
    config_path, weights_path = (
        _file(source, subfolder, name) for name in (DIFFUSERS_CONFIG, DIFFUSERS_WEIGHTS)
    )
    tree = files.read_object(config_path)
    config = kl_config(tree, image_px, str(config_path))
    checkpoint = read_checkpoint(weights_path)
    return _import(checkpoint, config, DIFFUSERS_RULES, files.sha256(weights_path))


def kl_config(tree: Mapping[str, Any], image_px: int, where: str) -> KlConfig:
    """Our config for a diffusers AutoencoderKL; absent fields take AutoencoderKL's defaults.

    Raises UserError: a field with a value that KlAutoencoder does not build.
    """
    channels = tree.get("block_out_channels", (64,))
    levels = len(channels) if isinstance(channels, (list, tuple)) else 0
    expected: dict[str, Any] = {
        "_class_name": "AutoencoderKL",
        "in_channels": 3,
        "out_channels": 3,
        "act_fn": "silu",
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    for key, value in expected.items():
        if tree.get(key, value) != value:
            raise UserError(f"{where}: {key} is {tree[key]!r}; only {value!r} can be imported")
    fields = {
        "image_px": image_px,
        "latent_channels": tree.get("latent_channels", 4),
        "block_channels": channels,
        "blocks_per_level": tree.get("layers_per_block", 1),
        "norm_groups": tree.get("norm_num_groups", 32),
        "middle_attention": tree.get("mid_block_add_attention", True),
        "quant_conv": tree.get("use_quant_conv", True),
        "post_quant_conv": tree.get("use_post_quant_conv", True),
    }
    return from_dict(KlConfig, fields, where=where)


def _import(checkpoint: Checkpoint, config: KlConfig, rules: Sequence[Rule], sha256: str) -> Imported:
    translation = translate(checkpoint.tensors, rules)
    with describing(checkpoint.where), shapes_only():
        ours = shapes(KlAutoencoder(config))
    theirs = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}

    def build() -> KlAutoencoder:
        model = KlAutoencoder(config)
        load_exact(model, translation.assemble(checkpoint.tensors, ours), checkpoint.where)
        return model.eval()

    provenance = {"imported": {"from": checkpoint.where, "sha256": sha256}}
    return Imported(check(translation, theirs, ours), provenance, build)


def _file(source: str, subfolder: str | None, name: str) -> Path:
    """A file of a local folder, or of a repository on the hub."""
    if Path(source).is_dir():
        path = Path(source) / (subfolder or "") / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the folder of a diffusers VAE, or its --subfolder")
        return path
    try:
        return hub.file(source, name, subfolder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{source}: no such folder, and {name} cannot be downloaded ({reason}); give a local folder"
        ) from None
