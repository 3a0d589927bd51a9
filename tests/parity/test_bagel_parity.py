"""Against Bagel's own code (ByteDance-Seed/Bagel, commit 056b5fd): names, velocities, cross entropies, gradients.

tests/golden/bagel_forward.json is what that code computed, on a CPU in fp32 (its casts of queries, keys and values to
bf16 taken as casts to fp32, its attention kernel as PyTorch's plain one), with the weights, latents and noises of
`wave` below, and the samples of SAMPLES.
"""

import json
import math
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from base.config import UserError
from base.files import write_json
from data.packs.packed_batch import ImageSplit, PackedBatch, TextSplit, build_packed_batch
from data.shards import LatentInfo
from generator.bagel import LM_HEAD, POSITIONS, bagel_name, export_bagel, import_bagel
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from generator.embeddings import grid_sinusoids
from generator.flow import interpolate
from generator.model import Generator

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bagel_forward.json").read_text())
CHANNELS, SIDE, SHIFT = 8, 8, 2.0
LATENTS = LatentInfo("fp32", (CHANNELS, 2, 3), (0.0,) * CHANNELS, (1.0,) * CHANNELS, "autoencoder", "text")
LLM_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
# A text: its ids, and whether they are predicted. An image: its grid, and the logit of its time (None: clean).
SAMPLES = [
    [([120, 5, 9, 33, 121], True), ((2, 3), 0.3)],
    [((2, 2), None), ([120, 7, 121], False), ((3, 2), -0.8)],
    [
        ([120, 77, 121], False),
        ((1, 2), None),
        ([120, 3, 4, 50, 6, 121], True),
        ((2, 2), 1.2),
        ((2, 2), -0.1),
    ],
]


def wave(name: str, shape: tuple[int, ...]) -> Tensor:
    """Numbers of a size that keeps activations near one, the same on every machine and for every library."""
    places = torch.arange(math.prod(shape), dtype=torch.float64)
    phase = zlib.crc32(name.encode()) % 1000 / 1000 * 2 * math.pi
    values = torch.sin(places * 1.7 + phase) + torch.cos(places * places * 0.37 + 2 * phase)
    if "norm" in name:
        values = 1 + 0.1 * values
    elif name.endswith("bias"):
        values = 0.1 * values
    else:
        values = values / math.sqrt(shape[-1])
    return values.reshape(shape).float()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A folder as Bagel's authors publish them, of the tiny model that the golden file was computed with."""
    folder = tmp_path_factory.mktemp("bagel")
    tensors = {name: wave(name, tuple(shape)) for name, shape in GOLDEN["parameters"].items()}
    tensors[POSITIONS] = grid_sinusoids(torch.arange(SIDE * SIDE), SIDE, 64)
    save_file(tensors, str(folder / "ema.safetensors"))
    write_json(folder / "llm_config.json", LLM_CONFIG)
    return folder


def packed() -> tuple[PackedBatch, Tensor, Tensor]:
    """The samples, x_t of all images and their times, in the pack's order: clean images first."""
    samples, noises, logits = [], [], []
    for sample in SAMPLES:
        splits: list[TextSplit | ImageSplit] = []
        for first, second in sample:
            if isinstance(first, list):
                splits.append(TextSplit(first, loss=second))
                continue
            height, width = first
            latents = wave(f"latent{len(noises)}", (CHANNELS, height, width)) * math.sqrt(width)
            noises.append(wave(f"noise{len(noises)}", (height * width, CHANNELS)) * math.sqrt(CHANNELS))
            logits.append(-math.inf if second is None else second)
            splits.append(ImageSplit(latents, noisy=second is not None))
        samples.append(splits)
    batch = build_packed_batch(
        samples,
        vision_start_id=122,
        vision_end_id=123,
        max_side=SIDE,
        seed=0,
        sample_ids=[str(number) for number in range(len(samples))],
    )
    order = sorted(range(len(logits)), key=lambda image: logits[image] != -math.inf)
    times = torch.tensor([logits[image] for image in order]).sigmoid()
    times = SHIFT * times / (1 + (SHIFT - 1) * times)
    noise = torch.cat([noises[image] for image in order])
    return batch, interpolate(batch.latents, noise, times[batch.image_index][:, None]), times


def test_names_and_shapes_are_bagels(checkpoint) -> None:
    model = import_bagel(checkpoint, LATENTS).build()
    ours = {bagel_name(name): list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {**ours, POSITIONS: [SIDE * SIDE, 64]} == GOLDEN["parameters"]


def test_outputs_and_gradients_are_those_of_bagels_code(checkpoint) -> None:
    imported = import_bagel(checkpoint, LATENTS)
    assert imported.report.problems == ()
    model = imported.build()
    batch, x_GC, times = packed()
    velocity, text_loss = model.forward_with_text(batch, x_GC, times)
    # 2e-6 of values near one: fp32 sums in another order, and eight printed digits
    torch.testing.assert_close(velocity, torch.tensor(GOLDEN["velocity"]), rtol=0, atol=5e-6)
    cross_entropy = torch.tensor(GOLDEN["cross_entropy"])
    torch.testing.assert_close(text_loss, cross_entropy.sum(), rtol=1e-6, atol=0)

    noisy = slice(len(x_GC) - batch.num_loss_tokens, None)
    times_T = times[batch.image_index][noisy, None]
    noise = (x_GC[noisy] - (1 - times_T) * batch.latents[noisy]) / times_T
    loss = (velocity - (noise - batch.latents[noisy])).square().mean()
    torch.testing.assert_close(loss.item(), GOLDEN["mse"], rtol=1e-5, atol=0)
    (loss + text_loss / len(cross_entropy)).backward()
    norms = {bagel_name(name): parameter.grad.norm().item() for name, parameter in model.named_parameters()}
    assert norms.keys() == GOLDEN["gradient_norms"].keys()
    for name, expected in GOLDEN["gradient_norms"].items():
        # 1e-4: a sum of many terms that nearly cancel, in another order; biases of keys have gradients near zero
        assert norms[name] == pytest.approx(expected, rel=1e-4, abs=1e-6), name


def test_what_is_exported_is_what_was_imported(checkpoint, tmp_path) -> None:
    model = import_bagel(checkpoint, LATENTS).build()
    export_bagel(model, tmp_path)
    theirs, ours = (load_file(folder / "ema.safetensors") for folder in (checkpoint, tmp_path))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    again = import_bagel(tmp_path, LATENTS)
    assert again.build().config == model.config and again.report.problems == ()


def test_a_tied_head_is_written_for_bagel_and_found_to_be_tied(tmp_path) -> None:
    backbone = MotConfig(
        vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=8, mlp_width=8
    )
    model = Generator.create(GeneratorConfig(backbone, max_side=4), LATENTS, seed=0)
    export_bagel(model, tmp_path)
    assert LM_HEAD in load_file(tmp_path / "ema.safetensors")
    imported = import_bagel(tmp_path, LATENTS)
    assert imported.report.problems == ()
    built = imported.build()
    assert built.config.tied_text_output
    found = built.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_what_does_not_fit_is_named(checkpoint, tmp_path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "ema.safetensors"
    tensors = load_file(path)
    sees = {"vit_model.a": torch.zeros(1), "connector.fc1.bias": torch.zeros(1)}
    strange = {name: tensor for name, tensor in tensors.items() if name != "llm2vae.bias"}
    save_file({**strange, **sees, "what": torch.zeros(2)}, str(path))
    report = import_bagel(tmp_path, LATENTS).report
    assert report.problems == ("theirs, unknown: what [2]", "ours, not in the file: latent_out.bias [8]")
    assert sorted(report.left_out) == sorted(sees)
    save_file({**tensors, POSITIONS: tensors[POSITIONS] + 0.1}, str(path))
    with pytest.raises(UserError, match="differs from the fixed sin-cos table by 1"):
        import_bagel(tmp_path, LATENTS)
    path.unlink()
    with pytest.raises(UserError, match=r"neither ema\.safetensors nor model\.safetensors"):
        import_bagel(tmp_path, LATENTS)
    shutil.copyfile(checkpoint / "ema.safetensors", path)
    (tmp_path / "llm_config.json").unlink()
    with pytest.raises(UserError, match=r"llm_config\.json: no such file"):
        import_bagel(tmp_path, LATENTS)


def test_what_bagels_code_cannot_hold_is_not_exported(tmp_path) -> None:
    backbone = MotConfig(
        vocab_size=16, width=16, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, mlp_width=8
    )
    for config, words in (
        (GeneratorConfig(backbone, max_side=4, head=DdtHeadConfig(16, 1, 2)), "no DDT head"),
        (GeneratorConfig(backbone, max_side=4), "width = heads x head_dim"),
    ):
        with pytest.raises(UserError, match=words):
            export_bagel(Generator.create(config, LATENTS, seed=0), tmp_path)
