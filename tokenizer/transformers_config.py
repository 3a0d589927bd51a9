"""Configs of transformers' vision models: from the table of short names, a folder, the hub, or overrides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from base import hub
from base.config import ConfigError, UserError
from tokenizer import model_names
from tokenizer.model_names import FieldValue, KnownModel

# Config fields, over all architectures, that decide which function given weights compute.
DECISIVE_FIELDS = {
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "mlp_ratio",
    "hidden_act",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_register_tokens",
    "rope_theta",
    "qkv_bias",
    "query_bias",
    "key_bias",
    "value_bias",
    "proj_bias",
    "mlp_bias",
    "use_swiglu_ffn",
    "use_gated_mlp",
}
# These fields are off whatever a config says. Masking and pooling are no part of f. Augmented positions would be
# drawn from the global random state, for E and not for its replica.
FIXED_FIELDS: dict[str, float | None] = {
    "mask_ratio": 0.0,
    "vision_use_head": False,
    "pos_embed_shift": None,
    "pos_embed_jitter": None,
    "pos_embed_rescale": None,
}


def vision_config(name: str, known: KnownModel | None, overrides: Mapping[str, FieldValue]) -> Any:
    """The transformers config with the overrides applied."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, PreTrainedConfig

    model_type = overrides.get("model_type")
    if known is not None:
        config = _known_config(known)
    elif model_type is None:
        config = _read_config(name)
    else:
        try:
            config = AutoConfig.for_model(model_type)
        except ValueError:
            raise ConfigError(f"'{name}': transformers has no overrides.model_type {model_type!r}") from None
    fields = {field.name for field in dataclasses.fields(config)}
    # A user may set only the architecture's own fields, not those of every config (names of classes, types of outputs).
    settable = {
        name
        for name in fields
        - FIXED_FIELDS.keys()
        - {field.name for field in dataclasses.fields(PreTrainedConfig)}
        if not name.startswith("_")
    }
    for key, value in overrides.items():
        if key == "model_type" and known is None:
            continue
        if key not in settable:
            hint = f"it has {', '.join(sorted(settable & DECISIVE_FIELDS))}"
            raise ConfigError(f"'{name}': {type(config).__name__} has no field '{key}' to set; {hint}")
        try:
            setattr(config, key, value)
        except StrictDataclassError as error:
            raise ConfigError(f"'{name}': overrides.{key}: {one_line(error)}") from None
    for key, fixed in FIXED_FIELDS.items():
        if key in fields:
            setattr(config, key, fixed)
    return config


def _known_config(known: KnownModel) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(known.model_type, **known.fields)


def _read_config(name: str) -> Any:
    """The config in a folder or on the hub; for a model of images and text, the config of its image part."""
    from transformers import AutoConfig

    hint = model_names.closest(name, [model.hub for model in model_names.MODELS.values()])
    if "/" not in name and not Path(name).is_dir():
        raise ConfigError(
            f"no short name, hub repository or folder of a transformers model: '{name}'; {hint}"
        )
    try:
        config = hub.from_pretrained(AutoConfig, name)
    except (OSError, ValueError) as error:
        raise UserError(
            f"transformers cannot read or download the config of '{name}' ({one_line(error)}); offline give a "
            f"short name, or overrides with model_type and the sizes; {hint}"
        ) from None
    return getattr(config, "vision_config", config)


def check_against_hub(name: str, known: KnownModel) -> None:
    """Raises ConfigError where the hub's config differs from the table of short names, which rebuilds exports."""
    ours, theirs = _known_config(known), _read_config(known.hub)
    for key in sorted(DECISIVE_FIELDS & {field.name for field in dataclasses.fields(ours)}):
        if getattr(ours, key) != getattr(theirs, key, None):
            raise ConfigError(
                f"'{name}': the hub has {key} {getattr(theirs, key, None)!r} where tokenizer/model_names.py "
                f"has {getattr(ours, key)!r}; correct the table"
            )


def one_line(error: Exception) -> str:
    """The start of a library's message, without line breaks."""
    return " ".join(str(error).split())[:200]
