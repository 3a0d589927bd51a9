"""Short names of representation models: what timm and transformers call them, and their sizes.

A short name may stand in an export's config.json: an entry keeps its meaning for good.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

FieldValue = int | float | bool | str
SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "so400m": (1152, 27, 16)}
"""Width, blocks and heads of a size."""
WORDS = {"s": "small", "b": "base", "l": "large", "so400m": "so400m"}


@dataclass(frozen=True)
class KnownModel:
    """One pretrained model, as timm and transformers know it."""

    timm: str
    """timm's name of the model."""
    hub: str
    """The model's repository on the Hugging Face hub, for transformers."""
    input_px: int
    """Side of the input that gives 16x16 tokens."""
    model_type: str
    """transformers' word for the architecture."""
    fields: Mapping[str, FieldValue]
    """Fields of transformers' config class, so that the architecture is known without the hub."""
    timm_arguments: Mapping[str, FieldValue] = field(default_factory=dict)
    """Arguments of timm.create_model where timm's default differs from the trained model."""


def find(name: str) -> KnownModel | None:
    """The model with this short name, or with this hub repository; None if there is none."""
    return MODELS.get(name) or next((model for model in MODELS.values() if model.hub == name), None)


def closest(name: str, names: Iterable[str]) -> str:
    """`closest names: ...` among the short names and the library's `names`, to end an error message with."""
    matches = difflib.get_close_matches(name, [*MODELS, *names], n=4, cutoff=0.4)
    return f"closest names: {', '.join(matches or MODELS)}"


def _sizes(size: str) -> dict[str, FieldValue]:
    width, blocks, heads = SIZES[size]
    return {"hidden_size": width, "num_hidden_layers": blocks, "num_attention_heads": heads}


def _dinov2(size: str, registers: bool) -> KnownModel:
    fields = {**_sizes(size), "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6}
    if registers:
        timm_name = f"vit_{WORDS[size]}_patch14_reg4_dinov2.lvd142m"
        hub = f"facebook/dinov2-with-registers-{WORDS[size]}"
        return KnownModel(timm_name, hub, 224, "dinov2_with_registers", {**fields, "num_register_tokens": 4})
    timm_name, hub = f"vit_{WORDS[size]}_patch14_dinov2.lvd142m", f"facebook/dinov2-{WORDS[size]}"
    return KnownModel(timm_name, hub, 224, "dinov2", fields)


def _dinov3(size: str) -> KnownModel:
    rest = {"num_register_tokens": 4, "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-5}
    fields = {**_sizes(size), "intermediate_size": 4 * SIZES[size][0], "rope_theta": 100.0, **rest}
    hub = f"facebook/dinov3-vit{size}16-pretrain-lvd1689m"
    return KnownModel(f"vit_{WORDS[size]}_patch16_dinov3.lvd1689m", hub, 256, "dinov3_vit", fields)


def _siglip2(size: str) -> KnownModel:
    hidden = 4304 if size == "so400m" else 4 * SIZES[size][0]
    rest = {"image_size": 256, "patch_size": 16, "layer_norm_eps": 1e-6}
    fields = {**_sizes(size), "intermediate_size": hidden, **rest}
    timm_name = f"vit_{WORDS[size]}_patch16_siglip_256.v2_webli"
    # Checkpoints of fixed resolution belong to transformers' Siglip classes; the Siglip2 classes are for NaFlex.
    hub = f"google/siglip2-{WORDS[size]}-patch16-256"
    # Trained with the tanh form of GELU, as transformers has it; timm's base and large have the exact form.
    return KnownModel(timm_name, hub, 256, "siglip_vision_model", fields, {"act_layer": "gelu_tanh"})


def _mae(size: str) -> KnownModel:
    rest = {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-12}
    fields = {**_sizes(size), "intermediate_size": 4 * SIZES[size][0], **rest}
    hub = f"facebook/vit-mae-{WORDS[size]}"
    return KnownModel(f"vit_{WORDS[size]}_patch16_224.mae", hub, 256, "vit_mae", fields)


MODELS: dict[str, KnownModel] = {
    **{f"dinov2-{size}": _dinov2(size, registers=False) for size in ("s", "b", "l")},
    **{f"dinov2-{size}-reg": _dinov2(size, registers=True) for size in ("s", "b", "l")},
    **{f"dinov3-{size}": _dinov3(size) for size in ("s", "b", "l")},
    **{f"siglip2-{size}": _siglip2(size) for size in ("b", "l", "so400m")},
    **{f"mae-{size}": _mae(size) for size in ("b", "l")},
}
