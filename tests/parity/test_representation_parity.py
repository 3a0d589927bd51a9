"""Representation models against timm and transformers themselves, on tiny models with random weights, in fp32."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

from base.config import ConfigError
from helpers.weights import randomise
from tokenizer.config import RepresentationConfig
from tokenizer.model_names import MODELS
from tokenizer.representation import Representation

# Values are of order 1 (features) to 10 (intermediates). Within a library the same operations run: 5e-7 is seen, from
# the norm that is written out here; 1.2e-5 with MAE, whose sums follow its shuffle. Between the libraries 0, and
# 1.4e-5 with DINOv3, whose angles are divided by periods in one and multiplied by frequencies in the other.
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}
FAMILIES = ["dinov2-s", "dinov2-s-reg", "dinov3-s", "siglip2-b", "mae-b"]
TIMM = {"embed_dim": 48, "depth": 3, "num_heads": 3, "patch_size": 8}
TRANSFORMERS = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "patch_size": 8}
TRANSFORMERS |= {"image_size": 32}
CLASSES = {
    "dinov2-s": transformers.Dinov2Model,
    "dinov2-s-reg": transformers.Dinov2WithRegistersModel,
    "dinov3-s": transformers.DINOv3ViTModel,
    "siglip2-b": transformers.SiglipVisionModel,
    "mae-b": transformers.ViTMAEModel,
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def tiny(name: str, library: str, px: int = 32) -> Representation:
    overrides: dict[str, Any] = TIMM if library == "timm" else tiny_fields(name)
    config = RepresentationConfig(name, px, "random", overrides, library=library)  # type: ignore[arg-type]
    return Representation(config).eval()


def tiny_fields(name: str) -> dict[str, Any]:
    gives_hidden = "intermediate_size" in MODELS[name].fields
    # timm's MAE has 1e-6 where transformers' has 1e-12.
    rest = {"intermediate_size": 192} if gives_hidden else {}
    return {**TRANSFORMERS, **rest, "layer_norm_eps": 1e-5 if name == "dinov3-s" else 1e-6}


def plain_transformers(name: str) -> Any:
    cls = CLASSES[name]
    registers = {key: MODELS[name].fields[key] for key in ("num_register_tokens",) if "reg" in name}
    registers |= {"num_register_tokens": 4} if name == "dinov3-s" else {}
    unmasked = {"mask_ratio": 0.0} if name == "mae-b" else {}
    return cls(cls.config_class(**{**tiny_fields(name), **registers, **unmasked})).eval()


def copy_weights(theirs: nn.Module, ours: Representation, *, left: tuple[str, ...]) -> None:
    """All of ours from theirs; only names that start with one of `left` are left over."""
    state = theirs.state_dict()
    own = ours.vit.state_dict()
    assert all(name.startswith(left) for name in state.keys() - own.keys())
    ours.vit.load_state_dict({name: state[name] for name in own})


def normalised(ours: Representation, pixels_01: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (ours.mean, ours.std))
    return (pixels_01 - mean) / std


def watched(layers: Any, norm: nn.Module, run: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """Runs the plain model; what leaves every block, then what enters the last norm; and the model's output."""
    seen: list[Tensor] = []
    hooks = [layer.register_forward_hook(lambda module, inputs, out: seen.append(out)) for layer in layers]
    hooks.append(norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0])))
    with torch.no_grad():
        output = run()
    for hook in hooks:
        hook.remove()
    return seen, output


def check(ours: Representation, pixels_01: Tensor, seen: list[Tensor], num_prefix: int, eps: float) -> None:
    *blocks, last = seen
    expected = (last - last.mean(2, keepdim=True)) / (last.var(2, keepdim=True, unbiased=False) + eps).sqrt()
    with torch.no_grad():
        f = ours(pixels_01)
        levels = ours.intermediates(pixels_01, [0, 2])
    torch.testing.assert_close(f.flatten(2).transpose(1, 2), expected[:, num_prefix:], **TOLERANCE)
    for (patches, prefix), block in zip(levels, (blocks[0], blocks[2]), strict=True):
        torch.testing.assert_close(patches, block[:, num_prefix:], **TOLERANCE)
        torch.testing.assert_close(prefix, block[:, :num_prefix], **TOLERANCE)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_features_are_the_plain_models(name: str) -> None:
    arguments = {**TIMM, **MODELS[name].timm_arguments}
    theirs = timm.create_model(MODELS[name].timm, pretrained=False, img_size=32, **arguments).eval()
    randomise(theirs)
    ours = tiny(name, "timm")
    copy_weights(theirs, ours, left=("norm.", "attn_pool.", "fc_norm.", "head."))
    pixels_01 = torch.rand(2, 3, 32, 32)
    x = normalised(ours, pixels_01)
    seen, _ = watched(theirs.blocks, theirs.norm, lambda: theirs.forward_features(x))
    check(ours, pixels_01, seen, theirs.num_prefix_tokens, theirs.norm.eps)


@pytest.mark.parametrize("px", [32, 48], ids=["native grid", "interpolated positions"])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_features_are_the_plain_models(name: str, px: int) -> None:
    theirs = plain_transformers(name)
    randomise(theirs)
    ours = tiny(name, "transformers", px)
    norm = {"dinov3-s": "norm", "siglip2-b": "post_layernorm"}.get(name, "layernorm")
    copy_weights(theirs, ours, left=(f"{norm}.", "head."))
    layers = next(module for module in theirs.modules() if isinstance(module, nn.ModuleList))
    pixels_01 = torch.rand(2, 3, px, px)
    asks = {"interpolate_pos_encoding": True} if name in ("siglip2-b", "mae-b") else {}
    x = normalised(ours, pixels_01)
    seen, output = watched(layers, getattr(theirs, norm), lambda: theirs(x, **asks))
    if name == "mae-b":  # the plain model shuffles the patches, even when it masks none
        restore = output.ids_restore[:, :, None].expand(-1, -1, 48)
        seen = [torch.cat([out[:, :1], out[:, 1:].gather(1, restore)], dim=1) for out in seen]
        assert not torch.equal(output.ids_restore[0], torch.arange(restore.shape[1]))
    num_prefix = {"dinov2-s": 1, "dinov2-s-reg": 5, "dinov3-s": 5, "siglip2-b": 0, "mae-b": 1}[name]
    check(ours, pixels_01, seen, num_prefix, theirs.config.layer_norm_eps)


# transformers' name of a layer's part -> timm's
PARTS = [
    (r"^(?:encoder\.|model\.)?layers?\.", "blocks."),
    (r"\.(?:attention|self_attn)\.o(?:ut)?_proj\.", ".attn.proj."),
    (r"\.(?:layer_norm1|layernorm_before)\.", ".norm1."),
    (r"\.(?:layer_norm2|layernorm_after)\.", ".norm2."),
    (r"\.mlp\.up_proj\.", ".mlp.fc1."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
    (r"^embeddings\.patch_embeddings?\.(?:projection\.)?(weight|bias)$", r"patch_embed.proj.\1"),
    (r"^embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.cls_token$", "cls_token"),
]


def timm_state(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of transformers' model under timm's names."""
    tensors: dict[str, Tensor] = {}
    scale = ("gamma_1", "gamma_2") if name == "dinov3-s" else ("ls1.gamma", "ls2.gamma")
    for key, tensor in state.items():
        for pattern, replacement in PARTS:
            key = re.sub(pattern, replacement, key)
        key = key.replace("layer_scale1.lambda1", scale[0]).replace("layer_scale2.lambda1", scale[1])
        tensors[key] = tensor
    for key in [key for key in tensors if ".q_proj." in key]:
        q = tensors[key]
        k, v = (tensors.get(key.replace("q_proj", other)) for other in ("k_proj", "v_proj"))
        stacked = torch.cat([q, torch.zeros_like(q) if k is None else k, v])
        tensors[re.sub(r"\.(?:attention|self_attn)\.q_proj", ".attn.qkv", key)] = stacked
    if name == "dinov2-s-reg":  # timm keeps the class token's position in the token
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    if name == "siglip2-b":
        tensors["pos_embed"] = tensors["pos_embed"][None]
    tensors.pop("embeddings.mask_token", None)
    return {key: tensor for key, tensor in tensors.items() if not re.search(r"\.[qkv]_proj\.", key)}


@pytest.mark.parametrize("name", FAMILIES)
def test_both_libraries_agree_on_the_same_weights(name: str) -> None:
    theirs, ours = tiny(name, "transformers"), tiny(name, "timm")
    randomise(theirs)
    if name == "dinov3-s":  # DINOv3's checkpoints have q and v biases of 0, and timm's model has none
        with torch.no_grad():
            for key, parameter in theirs.vit.named_parameters():
                if key.endswith(("q_proj.bias", "v_proj.bias")):
                    parameter.zero_()
    tensors = timm_state(name, dict(theirs.vit.state_dict()))
    if name == "dinov3-s":
        tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith("attn.qkv.bias")}
    ours.vit.load_state_dict(tensors)
    pixels_01 = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(theirs(pixels_01), ours(pixels_01), **TOLERANCE)
        for one, other in zip(
            theirs.intermediates(pixels_01, [0, 2]), ours.intermediates(pixels_01, [0, 2]), strict=True
        ):
            torch.testing.assert_close(one, other, **TOLERANCE)
    assert (theirs.mean, theirs.std) == (ours.mean, ours.std)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["dinov2-s-reg", "siglip2-b", "mae-b"])
def test_pretrained_folder_gives_its_weights(name: str, tmp_path: Path) -> None:
    """Checkpoints as published: with a text model (SigLIP), with MAE's decoder; config and weights from disk."""
    theirs = plain_transformers(name)
    if name == "siglip2-b":
        text = {key: tiny_fields(name)[key] for key in ("hidden_size", "intermediate_size")}
        text |= {"vocab_size": 20, "num_hidden_layers": 1, "num_attention_heads": 3}
        both = transformers.SiglipConfig(vision_config=theirs.config.to_dict(), text_config=text)
        whole = transformers.SiglipModel(both)
        theirs = whole.vision_model
    elif name == "mae-b":
        decoder = {
            "decoder_hidden_size": 48,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 3,
        }
        whole = transformers.ViTMAEForPreTraining(
            transformers.ViTMAEConfig(**{**tiny_fields(name), **decoder})
        )
        theirs = whole.vit
    else:
        whole = theirs
    randomise(theirs)
    whole.save_pretrained(tmp_path)
    ours = Representation(RepresentationConfig(str(tmp_path), 32, library="transformers"))
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.vit.state_dict().items())
    with pytest.raises(ConfigError, match="cannot build"):  # weights for other sizes, not taken in part
        Representation(
            RepresentationConfig(
                str(tmp_path), 32, overrides={"num_hidden_layers": 4}, library="transformers"
            )
        )
