"""Draws images of a file of prompts and edits as an image set that suites score; several ranks; resumable.

The set holds result/KEY.png, the sources of edits as the model sees them (source/KEY.png, or source0/KEY.png,
source1/KEY.png, ...), manifest.jsonl, and sampling.json. generator/draw_on_ranks.py shares the images among ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from base import files
from base.config import UserError
from base.team import ALONE, Team
from data.image_set import Item, write_image
from data.samples.layouts import number_roles
from generator.draw_on_ranks import announce, draw_on_ranks, export_digest, sampling_settings
from generator.pipeline import Pipeline
from generator.prompts import Prompt, read_prompts
from generator.sampling_config import SamplingConfig

READERS = 8
"""Threads that read source images for hashing, because a network file system answers each read late."""


@dataclass(frozen=True)
class SampledSetConfig:
    """What to draw, with which models, and where to write it."""

    prompts: Path
    """File of prompts and edits (generator/prompts.py)."""
    out: Path
    """Folder of the image set."""
    generator: Path
    """Exported generator."""
    autoencoder: str
    """The autoencoder that the generator was trained with."""
    text_tokenizer: str
    """The text tokenizer that the generator was trained with."""
    sampling: SamplingConfig
    """How images are drawn; `batch_images` is the size of a block."""
    images_per_prompt: int = 1
    """Number of images of each item; above 1 their keys are KEY-0, KEY-1, ..."""
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
        """Role -> the given source file."""
        images = self.prompt.images
        roles = ["source"] if len(images) == 1 else number_roles("source", len(images))
        return dict(zip(roles, images, strict=True))

    @property
    def names(self) -> dict[str, str]:
        """Role -> file in the set; the result comes last, as it is written last."""
        return {role: f"{role}/{self.key}.png" for role in (*self.sources, "result")}

    def is_done(self, out: Path) -> bool:
        return all((out / name).is_file() for name in self.names.values())


def draw_set(config: SampledSetConfig, team: Team = ALONE) -> int:
    """Draws with exported models (generator/draw_on_ranks.py says how). Returns the set's size.

    Raises UserError: as read_prompts and Pipeline.load; an image that cannot be read; a set in `out` that was drawn
    with other settings.
    """
    exports = {"generator": export_digest(config.generator)} if team.rank == 0 else {}
    return draw_prompts(
        lambda: Pipeline.load(config.generator, config.autoencoder, config.text_tokenizer, config.device),
        config.prompts,
        config.out,
        config.sampling,
        config.images_per_prompt,
        drawn_with=exports,
        team=team,
    )


def draw_prompts(
    load: Callable[[], Pipeline],
    prompts: Path,
    out: Path,
    sampling: SamplingConfig,
    images_per_prompt: int,
    *,
    drawn_with: Mapping[str, Any],
    team: Team,
    in_step: bool = False,
) -> int:
    """Draws like draw_on_ranks, with models from `load`. `drawn_with`: on rank 0, what tells the models from others."""
    settings = sampling_settings(sampling)
    read = read_prompts(prompts)
    drawings = _drawings(read, images_per_prompt, sampling.seed)
    inputs: dict[str, Any] = {}
    if team.rank == 0:
        announce(sampling)
        inputs = {
            "prompts": files.sha256(prompts),
            "images_per_prompt": images_per_prompt,
            **_sources_digest(read),
        }

    def item(one: _Drawing) -> Item:
        return Item(one.key, one.names, {**one.prompt.meta, "seed": one.seed, "sampling": settings})

    return draw_on_ranks(
        drawings,
        out,
        block_images=sampling.batch_images,
        drawn_with={**settings, **inputs, **drawn_with},
        start=lambda: partial(_draw_block, sampling, load()),
        write=partial(_write, out),
        item=item,
        team=team,
        in_step=in_step,
    )


def _sources_digest(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Digest of the images to edit, file after file, as an entry of sampling.json; {} without images. Raises UserError.

    Reads every file, at about half a GB a second. A file that only moved or was touched keeps its digest.
    """
    sources = list(dict.fromkeys(path for prompt in prompts for path in prompt.images))
    try:
        with ThreadPoolExecutor(READERS) as readers:
            hashes = list(readers.map(files.sha256, sources))
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror}); see to that file") from None
    return {"sources": files.digest(hashes)} if sources else {}


def _drawings(prompts: Sequence[Prompt], count: int, seed: int) -> list[_Drawing]:
    """The drawings: prompt after prompt, image after image."""
    return [
        _Drawing(
            prompt.key if count == 1 else f"{prompt.key}-{number}",
            prompt,
            prompt.image_seed(number, seed),
        )
        for prompt in prompts
        for number in range(count)
    ]


@dataclass(frozen=True)
class _Block:
    """The images of a drawn block."""

    results: Tensor  # uint8 [N, 3, H, W]
    sources: dict[Path, Tensor]  # every source, uint8 [3, H, W]


def _draw_block(config: SamplingConfig, pipeline: Pipeline, block: Sequence[_Drawing]) -> _Block:
    files_met = dict.fromkeys(path for one in block for path in one.prompt.images)
    sources = {path: pipeline.read_pixels(path) for path in files_met}
    met = {one.prompt.key: one.prompt for one in block}
    conditions = {
        key: pipeline.condition(prompt.text, [sources[path] for path in prompt.images])
        for key, prompt in met.items()
    }
    seeds = [one.seed for one in block]
    return _Block(pipeline.draw([conditions[one.prompt.key] for one in block], seeds, config), sources)


def _write(out: Path, block: Sequence[_Drawing], drawn: _Block) -> None:
    for one, result in zip(block, drawn.results, strict=True):
        if not one.is_done(out):
            images = [drawn.sources[path] for path in one.sources.values()]
            for name, image in zip(one.names.values(), [*images, result], strict=True):
                write_image(out / name, image)
