"""A file of prompts and edits -> drawn images, as an image set that suites score; several ranks; resumable.

The set holds result/KEY.png, the sources of edits as the model sees them (source/KEY.png, or source0/KEY.png,
source1/KEY.png, ...), manifest.jsonl, and sampling.json, which says what the images were drawn with.

Images are drawn in blocks of `sampling.batch_images` neighbours of the list, and a block is always drawn as a whole:
matrix products may round differently in another company, so this makes the images the same bytes on any number of ranks
and after any interruption.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from data.layouts import number_roles
from data.progress import ProgressLine
from engine import files
from engine.config import UserError, to_dict
from evaluation.manifest import Item, write_image, write_manifest
from generator.model import CONFIG_NAME, WEIGHTS_NAME
from generator.pipeline import Pipeline
from generator.prompts import Prompt, read_prompts
from generator.sampling import SamplingConfig
from generator.solvers import num_evaluations

SETTINGS_NAME = "sampling.json"


@dataclass(frozen=True)
class SampledSetConfig:
    """What is drawn, with what, and where to."""

    prompts: Path
    """File of prompts and edits (generator/prompts.py)."""
    out: Path
    """Folder of the image set."""
    generator: Path
    """Exported generator."""
    autoencoder: str
    """Autoencoder that it was trained with."""
    text_tokenizer: str
    """Text tokenizer that it was trained with."""
    sampling: SamplingConfig
    """How; `batch_images` is the size of a block."""
    images_per_prompt: int = 1
    """Images of each item; above 1 their keys are KEY-0, KEY-1, ..."""
    device: str = "cpu"
    """Where the models run."""

    def __post_init__(self) -> None:
        if self.images_per_prompt < 1:
            raise UserError(f"{self.images_per_prompt} images of each prompt; give at least 1")


@dataclass(frozen=True)
class _Drawing:
    """One image to draw."""

    key: str
    prompt: Prompt
    seed: int

    @property
    def sources(self) -> dict[str, Path]:
        """Role -> the file that was given."""
        images = self.prompt.images
        roles = ["source"] if len(images) == 1 else number_roles("source", len(images))
        return dict(zip(roles, images, strict=True))

    @property
    def names(self) -> dict[str, str]:
        """Role -> file in the set; the result, which is written last, is the last."""
        return {role: f"{role}/{self.key}.png" for role in (*self.sources, "result")}

    def is_done(self, out: Path) -> bool:
        return all((out / name).is_file() for name in self.names.values())


def draw_set(
    config: SampledSetConfig, *, rank: int = 0, world: int = 1, barrier: Callable[[], None] = lambda: None
) -> int:
    """Draws blocks i with i % world == rank; after `barrier`, rank 0 writes the manifest. Returns the set's size.

    Images that an earlier run finished are kept. Raises UserError: as read_prompts and Pipeline.load; an image that
    cannot be read; a set in `out` that was drawn with something else.
    """
    drawings = _drawings(config, read_prompts(config.prompts))
    size = config.sampling.batch_images
    blocks = [drawings[start : start + size] for start in range(0, len(drawings), size)]
    mine = [block for block in blocks[rank::world] if not all(one.is_done(config.out) for one in block)]
    if rank == 0:
        _claim(config)
    pipeline = None
    if mine:
        pipeline = Pipeline.load(config.generator, config.autoencoder, config.text_tokenizer, config.device)
    barrier()  # before this nobody writes into a folder that rank 0 may refuse
    if pipeline is not None:
        _draw(config, pipeline, mine, rank)
    barrier()
    if rank == 0:
        write_manifest(config.out, [Item(one.key, one.names, _meta(config, one)) for one in drawings])
    return len(drawings)


def _drawings(config: SampledSetConfig, prompts: Sequence[Prompt]) -> list[_Drawing]:
    """Image after image of prompt after prompt."""
    count = config.images_per_prompt
    return [
        _Drawing(
            prompt.key if count == 1 else f"{prompt.key}-{number}",
            prompt,
            prompt.image_seed(number, config.sampling.seed),
        )
        for prompt in prompts
        for number in range(count)
    ]


def _claim(config: SampledSetConfig) -> None:
    """Notes in `out` what its images are drawn with."""
    settings = _settings(config)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        if not (config.generator / name).is_file():
            raise UserError(f"{config.generator / name}: no such file; give a run with an exported generator")
    settings["generator"] = files.digest(
        [files.sha256(config.generator / name) for name in (CONFIG_NAME, WEIGHTS_NAME)]
    )
    settings["prompts"] = files.sha256(config.prompts)
    settings["images_per_prompt"] = config.images_per_prompt
    path = config.out / SETTINGS_NAME
    found: dict[str, Any] = files.read_json(path) if path.is_file() else settings
    for name in sorted({*found, *settings}):
        if found.get(name) != settings.get(name):
            raise UserError(
                f"{config.out}: holds images of other settings ({name}: {_short(found.get(name))} there, "
                f"{_short(settings.get(name))} here); give another folder, or the same settings to go on"
            )
    files.write_json(path, settings)


def _settings(config: SampledSetConfig) -> dict[str, Any]:
    """The sampling, without what may change between two runs: the size of a block matters for rounding only."""
    settings = to_dict(config.sampling)
    del settings["batch_images"]
    return settings


def _draw(config: SampledSetConfig, pipeline: Pipeline, blocks: Sequence[list[_Drawing]], rank: int) -> None:
    total, done = sum(len(block) for block in blocks), 0
    steps, solver = config.sampling.num_steps, config.sampling.solver
    if rank == 0:
        evaluations = num_evaluations(steps, solver)
        print(f"{steps} {solver} steps, {evaluations} evaluations an image", file=sys.stderr, flush=True)
    progress = ProgressLine(f"rank {rank}: {total} images to draw", "images")
    with ThreadPoolExecutor(max_workers=1) as writer:  # the next block is drawn while PNGs are packed
        writing: Future[None] | None = None
        for block in blocks:
            results, sources = _draw_block(config, pipeline, block)
            if writing is not None:
                writing.result()
            writing = writer.submit(_write, config.out, block, results, sources)
            done += len(block)
            progress.show(done, done / total)
        if writing is not None:
            writing.result()


def _draw_block(
    config: SampledSetConfig, pipeline: Pipeline, block: Sequence[_Drawing]
) -> tuple[Tensor, dict[Path, Tensor]]:
    """Results uint8 [N, 3, H, W], and every source uint8 [3, H, W]."""
    files_met = dict.fromkeys(path for one in block for path in one.prompt.images)
    sources = {path: pipeline.read_pixels(path) for path in files_met}
    met = {one.prompt.key: one.prompt for one in block}
    conditions = {
        key: pipeline.condition(prompt.text, [sources[path] for path in prompt.images])
        for key, prompt in met.items()
    }
    seeds = [one.seed for one in block]
    return pipeline.draw([conditions[one.prompt.key] for one in block], seeds, config.sampling), sources


def _write(out: Path, block: Sequence[_Drawing], results: Tensor, sources: dict[Path, Tensor]) -> None:
    for one, result in zip(block, results, strict=True):
        if not one.is_done(out):
            images = [sources[path] for path in one.sources.values()]
            for name, image in zip(one.names.values(), [*images, result], strict=True):
                write_image(out / name, image)


def _meta(config: SampledSetConfig, one: _Drawing) -> dict[str, Any]:
    """What the file says of the item, and how its image was drawn."""
    return {**one.prompt.meta, "seed": one.seed, "sampling": _settings(config)}


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
