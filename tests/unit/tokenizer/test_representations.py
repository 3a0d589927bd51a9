"""Representation models by name: sizes to the digit, names, refusals, training and exports in both libraries."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from base.config import ConfigError, UserError, from_dict, to_dict
from data.samples.images import PixelBatch
from tokenizer import backbones, rpiae, transformers_config
from tokenizer.config import AutoencoderConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.model_names import MODELS
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder
from tokenizer.training.build_stage import build_stage
from tokenizer.training.discriminator import FrozenFeatures
from tokenizer.training.objectives import PivotObjective
from tokenizer.training.stage_config import DiscriminatorConfig, PerceptualConfig, StageConfig
from tokenizer.weights import state_hash

LIBRARIES = ["timm", "transformers"]
FAMILIES = ["dinov2-s", "dinov2-s-reg", "dinov3-s", "siglip2-b", "mae-b"]
NUM_PREFIX = dict(zip(FAMILIES, (1, 5, 5, 0, 1), strict=True))
TIMM = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8}
TRANSFORMERS = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "patch_size": 8}


def config(name: str, library: str, **changes: Any) -> RepresentationConfig:
    return RepresentationConfig(**{"name": name, "weights": "random", "library": library, **changes})


def tiny(name: str, library: str, **changes: Any) -> RepresentationConfig:
    overrides: dict[str, Any] = TIMM if library == "timm" else {**TRANSFORMERS, "image_size": 32}
    if library == "transformers" and "intermediate_size" in MODELS[name].fields:
        overrides = {**overrides, "intermediate_size": 192}
    return config(name, library, input_px=32, overrides={**overrides, **changes})


def on_meta(representation: RepresentationConfig) -> Representation:
    with torch.device("meta"):
        return Representation(representation)


def num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def pixels(px: int = 32) -> torch.Tensor:
    return torch.rand(2, 3, px, px, generator=torch.Generator().manual_seed(1))


def test_dinov2_b_reg_has_the_parameters_of_the_paper() -> None:
    assert num_parameters(on_meta(config("dinov2-b-reg", "transformers"))) == 86_582_016
    # timm: no mask token, the class token holds its own position (two vectors of 768 fewer), and a position
    # table of 16x16 instead of 37x37.
    assert num_parameters(on_meta(config("dinov2-b-reg", "timm"))) == 85_725_696
    assert 85_725_696 == 86_582_016 - (2 + 37 * 37 - 16 * 16) * 768


@pytest.mark.parametrize("name", MODELS)
def test_every_short_name_is_one_model_in_both_libraries(name: str) -> None:
    in_timm, in_transformers = (on_meta(config(name, library)) for library in LIBRARIES)
    for model in (in_timm, in_transformers):
        assert model.grid == (16, 16)
        assert model.last_mlp_weight.shape[0] == model.width
    facts = [
        (model.width, model.depth, model.mean, model.std, model.has_class_token, model.last_mlp_weight.shape)
        for model in (in_timm, in_transformers)
    ]
    assert facts[0] == facts[1]
    # What transformers has and timm has not, in vectors of the width.
    extra = {
        "dinov2": 1 + 37 * 37 - 16 * 16,  # mask token, the checkpoint's position table
        "dinov2_with_registers": 2 + 37 * 37 - 16 * 16,  # and a position for the class token
        "dinov3_vit": 1 + 2 * in_timm.depth,  # mask token, biases of q and v (zero in the checkpoints)
        "siglip_vision_model": 0,
        "vit_mae": 14 * 14 - 16 * 16,  # timm resamples the position table when it loads
    }[MODELS[name].model_type]
    assert num_parameters(in_transformers) - num_parameters(in_timm) == extra * in_timm.width


def release_of_the_encoder() -> dict[str, list[int]]:
    """Names and shapes of the RPiAE checkpoint's encoder, without their prefix `encoder.encoder.`."""
    embeddings = {
        "cls_token": [1, 1, 768],
        "mask_token": [1, 768],
        "position_embeddings": [1, 1370, 768],
        "register_tokens": [1, 4, 768],
        "patch_embeddings.projection.weight": [768, 3, 14, 14],
        "patch_embeddings.projection.bias": [768],
    }
    vectors = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    layer = {name: [768] for name in [*vectors, "layer_scale1.lambda1", "layer_scale2.lambda1"]}
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer |= {f"attention.{part}.weight": [768, 768], f"attention.{part}.bias": [768]}
    layer |= {"mlp.fc1.weight": [3072, 768], "mlp.fc1.bias": [3072]}
    layer |= {"mlp.fc2.weight": [768, 3072], "mlp.fc2.bias": [768]}
    layers = {f"encoder.layer.{i}.{name}": shape for i in range(12) for name, shape in layer.items()}
    return {**{f"embeddings.{name}": shape for name, shape in embeddings.items()}, **layers}


def test_transformers_state_has_the_names_of_the_release() -> None:
    own = {
        name.removeprefix("vit."): list(tensor.shape)
        for name, tensor in on_meta(config("dinov2-b-reg", "transformers")).state_dict().items()
    }
    assert len(own) == 222
    assert own == release_of_the_encoder()  # all of them: the release's last norm has no affine either


def test_timm_state_keeps_timms_names() -> None:
    plain = timm.create_model("vit_base_patch14_reg4_dinov2", num_classes=0, img_size=32, **TIMM)
    ours = Representation(tiny("dinov2-b-reg", "timm"))
    expected = {f"vit.{name}" for name in plain.state_dict()} - {"vit.norm.weight", "vit.norm.bias"}
    assert set(ours.state_dict()) == expected


@pytest.mark.parametrize(
    ("name", "px"), [("dinov2-b-reg", 224), ("mae-l", 256), ("siglip2-so400m", 256), ("dinov3-l", 256)]
)
def test_short_name_brings_its_input_size(name: str, px: int) -> None:
    assert RepresentationConfig(name).input_px == px
    assert RepresentationConfig(name, 448).input_px == 448
    assert from_dict(RepresentationConfig, to_dict(RepresentationConfig(name))).input_px == px


def test_full_name_needs_an_input_size() -> None:
    with pytest.raises(ConfigError, match=r"give input_px; closest names: dinov2-b-reg"):
        RepresentationConfig("dinov2-b-regs")


def test_config_of_an_old_export_still_parses() -> None:
    tree = {"name": "vit_base_patch14_reg4_dinov2.lvd142m", "input_px": 224, "weights": "pretrained"}
    tree |= {"overrides": {"img_size": 224}, "mean": None, "std": [0.2, 0.2, 0.2], "library": "timm"}
    assert to_dict(from_dict(RepresentationConfig, tree)) == {**tree, "num_summed_layers": 1}


@pytest.mark.parametrize(
    ("representation", "message"),
    [
        (config("dinov2-b-rge", "timm", input_px=224), "Unknown model.*closest names: dinov2-b-reg"),
        (
            config("vit_base_patch14_dinov2.lvd142", "timm", input_px=224),
            "closest names: vit_base_patch14_dino",
        ),
        (config("dinov2-b-rge", "transformers", input_px=224), "closest names: dinov2-b-reg"),
        (tiny("mae-b", "transformers", hiden_size=4), "ViTMAEConfig has no field 'hiden_size'"),
        (tiny("mae-b", "transformers", mask_ratio=0.5), "no field 'mask_ratio' to set"),
        (tiny("mae-b", "transformers", model_type="dinov2"), "no field 'model_type' to set"),
        (tiny("mae-b", "transformers", hidden_size="wide"), "overrides.hidden_size: .* expected int"),
        (tiny("siglip2-b", "transformers", num_attention_heads=5), "cannot build 'siglip2-b'"),
        (tiny("dinov2-s", "transformers", patch_size=7), "no multiple of the patch 7"),
        (
            config("mine", "transformers", input_px=32, overrides={"model_type": "vit_nae"}),
            "transformers has no overrides.model_type 'vit_nae'",
        ),
        (
            config("mine", "transformers", input_px=32, overrides={"model_type": "vit"}),
            "is a vit of transformers, not one of dinov2,",
        ),
    ],
)
def test_models_that_cannot_be_are_refused_in_one_line(
    representation: RepresentationConfig, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Representation(representation)
    assert "\n" not in str(caught.value)


class Planted:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return (Path.touch, (self.path,))


def test_a_path_among_the_overrides_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Older timm unpickled it, newer timm still opens it: no version gets to see it."""
    torch.save({"state_dict": Planted(tmp_path / "ran")}, tmp_path / "model.pth")
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was asked"))
    with pytest.raises(ConfigError, match=r"overrides\.checkpoint_path is no field to set"):
        Representation(tiny("dinov2-s", "timm", checkpoint_path=str(tmp_path / "model.pth")))
    assert not (tmp_path / "ran").exists()


def test_every_argument_of_timm_that_is_no_architecture_is_refused() -> None:
    """Whatever timm's create_model, builder and models take, but the numbers and switches that were gone through."""
    taken: set[str] = set()
    for function in (
        timm.create_model,
        timm.models.build_model_with_cfg,
        timm.models.VisionTransformer.__init__,
        timm.models.Eva.__init__,
    ):
        taken |= set(inspect.signature(function).parameters) - {"self", "kwargs", "model_name"}
    allowed = {*backbones.SIZES, *backbones.FACTORS, *backbones.SWITCHES, *backbones.CHOICES}
    assert allowed < taken
    for name in taken - allowed:
        with pytest.raises(ConfigError, match=f"overrides.{name} is no field to set"):
            Representation(tiny("dinov2-s", "timm", **{name: "x"}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"depth": 0}, "overrides.depth is 0; give an integer of 1 or more"),
        ({"embed_dim": -48}, "overrides.embed_dim is -48"),
        ({"patch_size": True}, "overrides.patch_size is True; give an integer"),
        ({"num_heads": 3.0}, "overrides.num_heads is 3.0"),
        ({"reg_tokens": -1}, "an integer of 0 or more"),
        ({"mlp_ratio": math.inf}, "overrides.mlp_ratio is inf; give a number above 0"),
        ({"qkv_bias": 1}, "give true or false"),
        ({"act_layer": "os.system"}, "overrides.act_layer is 'os.system'; give one of gelu,"),
    ],
)
def test_an_override_of_another_type_or_size_is_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Representation(tiny("dinov2-s", "timm", **overrides))


@pytest.mark.parametrize("key", ["architectures", "id2label", "_out_features", "dtype", "auto_map"])
def test_a_field_that_is_not_the_architectures_own_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"has no field '{key}' to set"):
        Representation(tiny("dinov2-s", "transformers", **{key: "x"}))


@pytest.mark.parametrize("kind", ["local-dir", "hf-hub", "hf_hub"])
def test_an_export_does_not_send_timm_to_a_folder_or_repository(kind: str, tmp_path: Path) -> None:
    Autoencoder(autoencoder(tiny("dinov2-s", "timm"))).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"dinov2-s"', f'"{kind}:{tmp_path}"'))
    with pytest.raises(UserError, match="an export is not built from a folder or repository"):
        Autoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("representation", "message"),
    [
        (
            RepresentationConfig("dinov2-s", library="transformers"),
            "weights of 'dinov2-s' cannot be downloaded",
        ),
        (RepresentationConfig("some/model", 224, library="transformers"), "config of 'some/model'"),
        (config("some/model", "transformers", input_px=224), "overrides with model_type and the sizes"),
    ],
)
def test_impossible_download_is_one_clear_line(
    representation: RepresentationConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=message) as caught:
        Representation(representation)
    assert "\n" not in str(caught.value)


def test_architecture_without_short_name_needs_no_download() -> None:
    overrides = {**TRANSFORMERS, "model_type": "dinov2_with_registers", "num_register_tokens": 2}
    model = Representation(config("some/model", "transformers", input_px=32, overrides=overrides))
    assert model(pixels()).shape == (2, 48, 4, 4)
    assert model.intermediates(pixels(), [1])[0][1].shape == (2, 3, 48)


def test_hub_that_disagrees_with_the_table_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = MODELS["siglip2-b"]
    for epsilon in (1e-6, 1e-5):
        vision = {**known.fields, "layer_norm_eps": epsilon}
        hub = SimpleNamespace(vision_config=transformers.SiglipVisionConfig(**vision))
        monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda name, hub=hub, **_: hub)
        if epsilon == 1e-6:
            transformers_config.check_against_hub("siglip2-b", known)
        else:
            with pytest.raises(ConfigError, match="the hub has layer_norm_eps 1e-05 where"):
                transformers_config.check_against_hub("siglip2-b", known)


@pytest.mark.parametrize(
    ("name", "library", "overrides", "output"),
    [
        ("vit_giant_patch14_dinov2", "timm", TIMM, "mlp.fc2"),
        ("vit_small_plus_patch16_dinov3", "timm", TIMM, "mlp.fc2"),
        ("dinov2-s", "transformers", {**TRANSFORMERS, "use_swiglu_ffn": True}, "mlp.down_proj"),
        ("dinov3-s", "transformers", {**TRANSFORMERS, "use_gated_mlp": True}, "mlp.down_proj"),
        ("dinov3-s", "transformers", TRANSFORMERS, "mlp.down_proj"),
        ("mae-b", "transformers", TRANSFORMERS, "mlp.fc2"),
    ],
)
def test_last_mlp_weight_is_the_output_layers_even_when_gated(
    name: str, library: str, overrides: dict[str, Any], output: str
) -> None:
    sized = {**overrides, "img_size": 32} if library == "timm" else overrides
    model = Representation(config(name, library, input_px=32, overrides=sized))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = names[id(model.last_mlp_weight)]
    assert found.endswith(f".1.{output}.weight")
    assert model.last_mlp_weight.shape[0] == model.width == 48


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_mode_draws_nothing(name: str, library: str) -> None:
    """Neither MAE's shuffle nor DINOv3's random positions: E must see what its frozen replica sees."""
    model = Representation(tiny(name, library))
    state = torch.get_rng_state()
    trained, frozen = model.train()(pixels()), model.eval()(pixels())
    assert torch.equal(trained, frozen)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(frozen.mean(dim=1), torch.zeros(2, 4, 4), atol=1e-5, rtol=0)  # no affine


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_features_follow_the_image_in_row_major_order(name: str, library: str) -> None:
    model = Representation(tiny(name, library)).eval()
    for layers in (
        module for module in model.vit.modules() if isinstance(module, nn.ModuleList | nn.Sequential)
    ):
        for layer in layers:  # without attention a token sees its own patch only
            for attention in ("attn", "attention", "self_attn"):
                for output in ("proj", "o_proj", "out_proj"):
                    linear = getattr(getattr(layer, attention, None), output, None)
                    if linear is not None:
                        nn.init.zeros_(linear.weight)
    changed = pixels()[:1].clone()
    changed[:, :, 8:16, 24:32] += 0.5  # the patch in row 1, column 3
    difference = (model(pixels()[:1]) - model(changed)).abs().sum(dim=1)[0]
    assert (difference > 1e-6).nonzero().tolist() == [[1, 3]]


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_discriminator_reads_every_family(name: str, library: str) -> None:
    features = FrozenFeatures(DiscriminatorConfig(tiny(name, library), depths=(0, 1)))
    levels = features.representation.intermediates(pixels(), [0, 1])
    for (patches, prefix), level in zip(levels, features(pixels()), strict=True):
        assert patches.shape == (2, 16, 48) and prefix.shape == (2, NUM_PREFIX[name], 48)
        expected = patches + prefix[:, :1] if NUM_PREFIX[name] else patches
        assert torch.equal(level, expected.transpose(1, 2))


def test_intermediates_stop_after_the_last_depth() -> None:
    model = Representation(tiny("dinov3-s", "transformers"))
    model.vit.model.layer[1].register_forward_hook(lambda *_: pytest.fail("the last block ran"))
    assert len(model.intermediates(pixels(), [0])) == 1


def autoencoder(representation: RepresentationConfig) -> AutoencoderConfig:
    decoder = PixelDecoderConfig(width=32, layers=1, heads=2, mlp_width=64, patch_px=8)
    return AutoencoderConfig(representation, decoder, image_px=32)


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("name", FAMILIES)
def test_replica_is_a_frozen_copy_and_no_part_of_an_export(name: str, library: str, tmp_path: Path) -> None:
    stage = StageConfig(
        stage="pivot",
        autoencoder=autoencoder(tiny(name, library)),
        perceptual=PerceptualConfig("none"),
        w_lpips=0.0,
        adaptive_pivot_start_step=0,
    )
    objective = build_stage(stage)
    assert isinstance(objective, PivotObjective)
    encoder, replica = objective.model.encoder, objective.replica
    assert state_hash(replica) == state_hash(encoder)
    assert {p.data_ptr() for p in replica.parameters()}.isdisjoint(p.data_ptr() for p in encoder.parameters())
    with torch.no_grad():  # E has moved: a replica that still ran E's blocks would move with it
        first = replica(pixels())
        for parameter in encoder.parameters():
            parameter.add_(0.05)
        assert torch.equal(replica(pixels()), first) and not torch.equal(encoder(pixels()), first)
    images = (pixels() * 255).byte()
    batch = PixelBatch(images, ("a", "b"), seed=3, meta=({}, {}))
    objective.loss(batch, step=0).loss_sum.backward()
    assert all(p.grad is None and not p.requires_grad for p in replica.parameters())
    without = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    assert without <= {"vit.embeddings.mask_token"}  # nothing is masked; it is kept for the checkpoint's sake

    objective.export(tmp_path)
    assert set(load_file(tmp_path / rpiae.WEIGHTS_NAME)) == set(Autoencoder(stage.autoencoder).state_dict())
    loaded = Autoencoder.load(tmp_path)
    assert not any("replica" in name for name, _ in loaded.named_modules())
    assert torch.equal(loaded.encode(pixels()), objective.model.encode(pixels()))


@pytest.mark.parametrize("library", LIBRARIES)
def test_local_weights_are_loaded_whole_or_refused(library: str, tmp_path: Path) -> None:
    source = Representation(tiny("dinov2-s-reg", library))
    path = tmp_path / "weights.safetensors"
    save_file(source.vit.state_dict(), str(path))
    arguments = {**to_dict(tiny("dinov2-s-reg", library)), "weights": str(path)}
    assert state_hash(Representation(RepresentationConfig(**arguments))) == state_hash(source)
    save_file({"surplus": torch.zeros(1), **source.vit.state_dict()}, str(path))
    with pytest.raises(UserError, match="unexpected: surplus"):
        Representation(RepresentationConfig(**arguments))


@pytest.mark.parametrize("library", LIBRARIES)
def test_f_may_be_the_normed_sum_of_the_last_layers(library: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        last = Representation(tiny("dinov2-s-reg", library)).eval()
        both = Representation(tiny("dinov2-s-reg", library)).eval()
        both.config = summed = Representation(
            RepresentationConfig(**{**vars(tiny("dinov2-s-reg", library)), "num_summed_layers": 2})
        ).config
        with torch.no_grad():
            for parameter in last.vit.parameters():  # blocks start as good as the identity
                parameter += 0.3 * torch.randn_like(parameter)
        both.vit.load_state_dict(last.vit.state_dict())
    assert from_dict(RepresentationConfig, to_dict(summed)) == summed
    first, second = (patches for patches, _ in last.intermediates(pixels(), (0, 1)))
    total = first + second
    centred = total - total.mean(2, keepdim=True)
    expected = centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()
    found = both(pixels())
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected, rtol=1e-4, atol=1e-5)  # fp32
    assert not torch.allclose(found, last(pixels()), atol=1e-2)
    torch.autograd.grad(found.square().sum(), both.last_mlp_weight)  # the adaptive weight asks for it


@pytest.mark.parametrize("count", [0, 3])
def test_a_sum_of_no_layers_or_too_many_is_refused(count: int) -> None:
    with pytest.raises(ConfigError, match="num_summed_layers"):
        on_meta(RepresentationConfig(**{**vars(tiny("dinov2-s", "timm")), "num_summed_layers": count}))
