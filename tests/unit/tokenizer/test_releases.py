"""Published weights -> ours: every name of the released RPiAE has a place, values arrive unchanged."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from base.config import UserError, dump
from helpers.commands import in_process
from launch import import_release
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig
from tokenizer.pixel_decoder import PixelDecoder
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.releases.renaming import Rule, check, translate
from tokenizer.releases.rpiae import RAE, RPIAE, RULES, import_rpiae, wanted_shapes
from tokenizer.rpiae import Autoencoder
from tokenizer.weights import state_hash

GOLDEN = Path(__file__).parents[2] / "golden" / "rpiae_release_parameters.txt"
TINY = AutoencoderConfig(
    representation=RepresentationConfig(
        name="tiny",
        input_px=28,
        weights="random",
        overrides={
            "model_type": "dinov2_with_registers",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 70,
            "patch_size": 14,
        },
        library="transformers",
    ),
    decoder=PixelDecoderConfig(width=48, layers=2, heads=4, mlp_width=96, patch_px=16),
    image_px=32,
    bridge=BridgeConfig(latent_channels=6, decoder_layers=2, num_heads=4),
)
ENCODER_OF_TRANSFORMERS_4 = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
}
BRIDGE = {
    "bridge.encoder.attention_norm": "vb_feature_encoder.norm1",
    "bridge.encoder.attention.qkv.": "vb_feature_encoder.attn.in_proj_",
    "bridge.encoder.attention.out": "vb_feature_encoder.attn.out_proj",
    "bridge.encoder.skip": "vb_feature_encoder.skip_proj",
    "bridge.encoder.mlp_norm": "vb_feature_encoder.norm2",
    "bridge.encoder.mlp.up": "vb_feature_encoder.proj2.0",
    "bridge.encoder.mlp.down": "vb_feature_encoder.proj2.3",
    "bridge.encoder": "vb_feature_encoder",
    "bridge.decoder.embed": "vb_feature_decoder.in_proj",
    "bridge.decoder.out": "vb_feature_decoder.out_proj",
    "bridge.decoder.layers": "vb_feature_decoder.net",
    ".attention_norm": ".norm1",
    ".mlp_norm": ".norm2",
    ".attention.qkv.": ".self_attn.in_proj_",
    ".attention.out": ".self_attn.out_proj",
    ".mlp.up": ".linear1",
    ".mlp.down": ".linear2",
}
DECODER = {
    "decoder.class_token": "decoder.trainable_cls_token",
    "decoder.embed": "decoder.decoder_embed",
    "decoder.norm": "decoder.decoder_norm",
    "decoder.to_pixels": "decoder.decoder_pred",
    "decoder.layers": "decoder.decoder_layers",
    ".attention_norm": ".layernorm_before",
    ".mlp_norm": ".layernorm_after",
    ".attention.out": ".attention.output.dense",
    ".mlp.up": ".intermediate.dense",
    ".mlp.down": ".output.dense",
}


def replaced(name: str, table: dict[str, str]) -> str:
    for ours, theirs in table.items():
        name = name.replace(ours, theirs)
    return name


def released(model: Autoencoder) -> dict[str, Tensor]:
    """The model under the authors' names."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("encoder.vit."):
            tensors[name.replace("encoder.vit.", "encoder.encoder.")] = tensor
        elif name.startswith("bridge."):
            tensors[replaced(name, BRIDGE)] = tensor
        elif ".attention.qkv." in name:
            for part, value in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                theirs = replaced(name, {"layers": "decoder_layers", "qkv": f"attention.{part}"})
                tensors[theirs] = value.clone()
        else:
            tensors[replaced(name, DECODER)] = tensor
    assert isinstance(model.decoder, PixelDecoder)
    return {**tensors, "decoder.decoder_pos_embed": model.decoder.positions}


@pytest.fixture(scope="module")
def model() -> Autoencoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(TINY).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str]]:
    """Runs import_release in this process; returns the exit status and everything printed."""

    def run(*arguments: object) -> tuple[int, str]:
        status, out, err = in_process(monkeypatch, capsys, *arguments, main=import_release.main)
        return status, out + err

    return run


def golden() -> dict[str, tuple[int, ...]]:
    lines = (line.split() for line in GOLDEN.read_text().splitlines())
    return {name: tuple(map(int, shape.split("x"))) for name, shape in lines}


def pixels() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_every_parameter_of_the_release_has_its_place() -> None:
    theirs = golden()
    report = check(translate(theirs, RULES), theirs, wanted_shapes(RPIAE))
    assert report.problems == () and report.left_out == ()
    assert {row.module: row.num_values for row in report.rows} == {
        "encoder": 86_582_016,
        "decoder": 415_352_704,
        "bridge.encoder": 4_235_648,
        "bridge.decoder": 43_167_744,
    }
    assert sum(row.num_theirs for row in report.rows) == len(theirs) == 770
    assert report.lines()[-1] == "every parameter is mapped; none is left over, neither theirs nor ours"


def test_raes_decoder_has_its_place() -> None:
    theirs = {
        name.removeprefix("decoder."): shape
        for name, shape in golden().items()
        if name.startswith("decoder.")
    }
    ours = {name: shape for name, shape in wanted_shapes(RAE).items() if name.startswith("decoder.")}
    report = check(translate(theirs, RULES), theirs, ours)
    assert report.problems == ()
    assert sum(math.prod(shape) for shape in theirs.values()) == report.rows[0].num_values == 415_352_704


@pytest.mark.parametrize("form", ["safetensors", "ema of a training checkpoint", "transformers 4, compiled"])
def test_imported_weights_compute_the_same(model: Autoencoder, tmp_path: Path, form: str) -> None:
    tensors, path = released(model), tmp_path / "weights.pt"
    if form == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, str(path))
    elif form == "ema of a training checkpoint":
        other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        torch.save({"model": other, "ema": tensors, "step": 7}, path)
    else:
        for ours, theirs in ENCODER_OF_TRANSFORMERS_4.items():
            tensors = {
                name.replace(ours, theirs) if name.startswith("encoder.") else name: tensor
                for name, tensor in tensors.items()
            }
        assert any("attention.attention.query" in name for name in tensors if name.startswith("encoder."))
        torch.save(
            {"state_dict": {f"module._orig_mod.{name}": value for name, value in tensors.items()}}, path
        )
    imported = import_rpiae(path, TINY)
    assert imported.report.problems == ()
    built = imported.build()
    with torch.no_grad():
        z, expected = built.encode(pixels()), model.encode(pixels())
        assert torch.equal(z, expected)
        assert torch.equal(built.decode(z), model.decode(expected))


def test_raes_decoder_joins_the_librarys_encoder(model: Autoencoder, tmp_path: Path) -> None:
    """Also without a class token: some of RAE's files have none, and its code then keeps the zero it began with."""
    encoder = tmp_path / "encoder.safetensors"
    save_file(model.encoder.vit.state_dict(), str(encoder))
    representation = dataclasses.replace(TINY.representation, weights=str(encoder))
    plain = dataclasses.replace(TINY, representation=representation, bridge=None)
    whole = Autoencoder(plain)
    nn.init.zeros_(whole.decoder.class_token)  # type: ignore[arg-type]
    tensors = {
        name.removeprefix("decoder."): tensor
        for name, tensor in released(whole).items()
        if name.startswith("decoder.") and "cls_token" not in name
    }
    torch.save(tensors, tmp_path / "model.pt")
    imported = import_rpiae(tmp_path / "model.pt", plain)
    assert imported.report.problems == () and state_hash(imported.build()) == state_hash(whole)
    assert any("class_token is not in the file" in note for note in imported.report.lines())


def test_verify_shows_the_table_and_writes_a_loadable_export(
    model: Autoencoder, tmp_path: Path, command: Callable[..., tuple[int, str]]
) -> None:
    torch.save({"model": released(model)}, tmp_path / "weights.pt")
    (tmp_path / "tiny.yaml").write_text(dump(TINY))
    arguments = ("rpiae", "--source", tmp_path / "weights.pt", "--config", tmp_path / "tiny.yaml")
    status, printed = command(*arguments, "--out", tmp_path / "export", "--verify")
    assert status == 0 and "every parameter is mapped" in printed
    assert state_hash(Autoencoder.load(tmp_path / "export")) == state_hash(model)
    status, printed = command(*arguments, "--out", tmp_path / "export")
    assert status == 2 and "is not an empty folder" in printed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("surplus", "theirs, unknown: head.weight [3]"),
        ("missing", "another shape: decoder.decoder_layers.1.attention.attention.query.weight"),
        (
            "shape",
            "another shape: vb_feature_encoder.to_moments.bias [3] -> bridge.encoder.to_moments.bias [12]",
        ),
        ("bridge", "ours, not in the file: bridge.decoder.embed.weight [32, 6]"),
    ],
)
def test_what_is_left_over_is_named_and_nothing_is_written(
    model: Autoencoder,
    tmp_path: Path,
    command: Callable[..., tuple[int, str]],
    change: str,
    message: str,
) -> None:
    tensors = released(model)
    if change == "surplus":
        tensors["head.weight"] = torch.zeros(3)
    elif change == "missing":
        del tensors["decoder.decoder_layers.1.attention.attention.key.weight"]
    elif change == "shape":
        tensors["vb_feature_encoder.to_moments.bias"] = torch.zeros(3)
    else:
        tensors = {name: tensor for name, tensor in tensors.items() if "vb_feature" not in name}
    torch.save(tensors, tmp_path / "weights.pt")
    (tmp_path / "tiny.yaml").write_text(dump(TINY))
    arguments = ("rpiae", "--source", tmp_path / "weights.pt", "--config", tmp_path / "tiny.yaml")
    status, printed = command(*arguments, "--out", tmp_path / "export")
    assert status == 1 and message in printed
    assert not (tmp_path / "export").exists()


def test_positions_in_another_order_are_refused(model: Autoencoder, tmp_path: Path) -> None:
    tensors = released(model)
    tensors["decoder.decoder_pos_embed"] = tensors["decoder.decoder_pos_embed"].roll(
        24, dims=-1
    )  # y before x
    torch.save(tensors, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="decoder_pos_embed differs"):
        import_rpiae(tmp_path / "weights.pt", TINY)


class Planted:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    torch.save({"weight": Planted(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(UserError, match="would run code"):
        read_checkpoint(tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such weights file"),
        (b"not a checkpoint", "would run code|not a readable"),
        ({}, "holds no weights by name"),
        (
            {"model": {"weight": torch.zeros(1), "note": "text"}},
            r"entry 'model': holds more than tensors \(note\)",
        ),
    ],
)
def test_files_that_are_no_weights_are_one_clear_line(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_names_that_only_begin_alike_stay_unknown() -> None:
    rules = [Rule(r"a\.(weight|bias)", r"b.\1")]
    translation = translate(["a.weight", "a.weights", "xa.bias"], rules)
    assert translation.sources == {"b.weight": ("a.weight",)}
    assert translation.unknown == ("a.weights", "xa.bias")
