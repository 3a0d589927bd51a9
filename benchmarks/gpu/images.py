"""Images a second: training of every tokenizer stage, encoding, and drawing from both kinds of generators."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from base.config import to_dict
from base.files import write_json
from benchmarks.gpu import kernels, steps
from benchmarks.gpu.recording import Recorder, Values, peak_gib, reset_peak, seconds_a_call, synchronise
from benchmarks.throughput import CONFIG, SHORTEST, fill, random_generator
from engine.distributed import Ranks
from generator.class_conditional.config import ClassSamplingConfig
from generator.class_conditional.model import new_generator
from generator.class_conditional.sampling import sample_class_latents
from generator.pipeline import in_bf16
from generator.sampling import Condition, sample_latents
from generator.sampling_config import SamplingConfig
from launch.runs.configs import ClassRun, GeneratorRun, Run, TokenizerRun
from launch.runs.tasks import read_run
from launch.sizing import synthetic
from launch.sizing.estimate import PAPER_LATENTS, untrained_latents
from launch.sizing.stage_size import FIRST_STEP, in_phases, phase_names
from tokenizer.config import CONFIG_NAME, FORMAT_VERSION, AutoencoderConfig, without_download
from tokenizer.rpiae import Autoencoder
from tokenizer.training.build_stage import autoencoder_config, build_untrained

CONFIGS = CONFIG.parents[1]
RING = 8
GUIDANCE = 2.05  # scale for classes: the paper's AutoGuidance; here both models have one size


@dataclass(frozen=True)
class Images:
    """Configs and sizes of the measurements."""

    stages: Path = CONFIGS / "tokenizer"
    """Folder of pivot.yaml, bridge.yaml and decoder.yaml."""
    t2i: Path = CONFIG
    classes: Path = CONFIGS / "generator" / "class" / "rpiae64_80.yaml"
    latents: tuple[int, int, int] = PAPER_LATENTS
    pack_images: int | None = None
    """Images of a pack; None: the config's."""
    batch_images: int = 64
    """Images that are encoded and drawn together."""
    num_steps: int = 50
    """Number of the solver's steps."""
    at_least_s: float = 1.5


def measure_stages(images: Images, ranks: Ranks, record: Recorder) -> None:
    """Records one line for each phase of each stage: with the adversary's loss, without, and in between."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("pivot", "bridge", "decoder"):
            record.run(name, lambda name=name: _stage(images, ranks, name, Path(folder)), needs_s=8)


def _stage(images: Images, ranks: Ranks, name: str, folder: Path) -> Values:
    run = stage_run(images, name, folder)
    number = images.pack_images or run.pixels.images_per_pack
    pixels = dataclasses.replace(run.pixels, images_per_pack=number)
    objective = build_untrained(in_phases(run.stage))
    ring = [synthetic.pixel_pack(pixels, seed).to(ranks.device) for seed in range(RING)]
    values: Values = {"images_a_pack": number, "phases": {}}
    with steps.stepping(objective, run.engine, ranks, 1) as take:
        for step, phase in enumerate(phase_names(run.stage), FIRST_STEP):
            packs = _around(ring)

            def one(step: int = step, packs: Callable[[], object] = packs) -> None:
                take([packs()], step)  # type: ignore[list-item]

            one(), one()
            reset_peak(ranks.device)
            seconds = seconds_a_call(one, ranks.device, at_least_s=images.at_least_s)
            memory = peak_gib(ranks.device)
            shares, unknown = kernels.profiled(one, ranks.device)
            values["phases"][phase] = {
                "images_per_s": number / seconds,
                "peak_gib": memory,
                "shares": shares,
                "kernels_without_a_class": unknown,
            }
    return values


def _around(ring: list[object]) -> Callable[[], object]:
    """A function that returns the packs in turn, without end."""
    place = -1

    def following() -> object:
        nonlocal place
        place = (place + 1) % len(ring)
        return ring[place]

    return following


def stage_run(images: Images, name: str, folder: Path) -> TokenizerRun:
    """The stage's config. An export to start from gets the earlier stage's shape and random weights."""
    run = _read(images.stages / f"{name}.yaml")
    assert isinstance(run, TokenizerRun)
    if name == "pivot":
        return run
    before = autoencoder_config(
        stage_run(images, {"bridge": "pivot", "decoder": "bridge"}[name], folder).stage
    )
    write_shape(folder, before)
    return dataclasses.replace(run, stage=dataclasses.replace(run.stage, init_from=str(folder)))


def write_shape(folder: Path, config: AutoencoderConfig) -> None:
    """Writes an export's config.json without weights: `build_untrained` reads nothing else."""
    tree = {"format_version": FORMAT_VERSION, Autoencoder.kind: to_dict(config), "provenance": {}}
    write_json(folder / CONFIG_NAME, tree)


def measure_encoding(images: Images, ranks: Ranks, record: Recorder) -> None:
    """Times uint8 pixels on the host to stored latents on the host, as launch/encode_latents.py encodes them."""

    def measure() -> Values:
        with tempfile.TemporaryDirectory() as folder:
            config = autoencoder_config(stage_run(images, "bridge", Path(folder)).stage)
        model = Autoencoder(without_download(config)).to(ranks.device).eval()
        pixels = synthetic.pixels(images.batch_images, config.image_px)

        @torch.inference_mode()
        def encode() -> None:
            model.encode(pixels.to(ranks.device).float() / 255).bfloat16().cpu()

        encode()
        reset_peak(ranks.device)
        seconds = seconds_a_call(encode, ranks.device, at_least_s=images.at_least_s)
        return {"images_per_s": images.batch_images / seconds, "peak_gib": peak_gib(ranks.device)}

    record.run("encode", measure, needs_s=5)


def measure_sampling(images: Images, ranks: Ranks, record: Recorder) -> None:
    """Times latents of text-to-image and of LightningDiT, both under guidance, in bf16."""
    record.run("text-to-image", lambda: _draw_text(images, ranks.device), needs_s=15)
    record.run("LightningDiT", lambda: _draw_classes(images, ranks.device), needs_s=15)


def _draw_text(images: Images, device: torch.device) -> Values:
    run = _read(images.t2i, "generator.init=random")
    assert isinstance(run, GeneratorRun)
    model = random_generator(run, images.latents, device).eval()
    text = synthetic.SyntheticText(run.generator.backbone.vocab_size)
    conditions = [Condition((0,) * (SHORTEST + index)) for index in range(images.batch_images)]
    config = SamplingConfig(num_steps=images.num_steps, batch_images=images.batch_images)

    def draw() -> None:
        with torch.no_grad():
            sample_latents(model, conditions, range(len(conditions)), config, text)

    return _drawn(draw, images, device)


def _draw_classes(images: Images, device: torch.device) -> Values:
    run = _read(images.classes)
    assert isinstance(run, ClassRun)
    model = new_generator(run.generator, untrained_latents(images.latents)).to(device).eval()
    fill(model)
    config = ClassSamplingConfig(
        num_steps=images.num_steps, batch_images=images.batch_images, guidance=GUIDANCE
    )
    labels = [index % run.generator.num_classes for index in range(images.batch_images)]
    return _drawn(lambda: sample_class_latents(model, labels, range(len(labels)), config), images, device)


def _drawn(draw: Callable[[], object], images: Images, device: torch.device) -> Values:
    with in_bf16(device):
        draw()
        synchronise(device)
        reset_peak(device)
        seconds = seconds_a_call(draw, device, at_least_s=images.at_least_s)
    return {
        "images_per_s": images.batch_images / seconds,
        "solver_steps": images.num_steps,
        "batch_images": images.batch_images,
        "peak_gib": peak_gib(device),
    }


def _read(path: Path, *overrides: str) -> Run:
    return read_run(path, overrides)
