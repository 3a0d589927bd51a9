"""Reconstructs a folder of images by any autoencoder, as an image set that suites score.

The set holds original/NAME.png (cropped and resized as the autoencoder sees it), result/NAME.png, if wanted
latents/NAME.npy, and manifest.jsonl; NAME is the path below the folder, without the suffix.

Images go through the autoencoder in fixed blocks of neighbours, so the files are the same bytes on any number of
ranks and after any interruption.

Shapes: B images, C latent channels, Y X latent grid, H W pixels.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from base import files
from base.config import UserError
from base.progress import ProgressLine
from base.team import ALONE, Team
from base.terminal import say
from data.image_set import MANIFEST_NAME, ImageSet, Item, write_image, write_manifest
from data.samples.images import IMAGE_PARTS, fit_image, open_image_file, to_rgb
from data.sources.folder_walk import images_below
from evaluation.metrics.reconstruction import psnr_db, to_uint8
from evaluation.store import share
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import ImageAutoencoder, fingerprint

SOURCE_NAME = "reconstruct.json"
ROLES = ("original", "result")

_Block = Sequence[tuple[str, Path]]  # name in the set and file of neighbours


@dataclass(frozen=True)
class ReconstructConfig:
    """What to reconstruct, with which autoencoder, and where to write it."""

    autoencoder: Path
    """Directory of any exported or imported autoencoder."""
    images: Path
    """Folder of images; its subfolders count too."""
    out: Path
    """Folder of the image set."""
    save_latents: bool = False
    """Whether to write every latent too, float32 [C, Y, X]."""
    batch_images: int = 16
    """Images in a block, that is in a forward pass. Another size may round differently."""
    device: str = "cpu"
    """Where the autoencoder runs."""


@dataclass(frozen=True)
class Reconstructed:
    """The result of a reconstruction."""

    num_images: int
    """Images in the set, including those of an earlier run."""
    unreadable: tuple[str, ...]
    """One line for each file that is no readable image."""
    psnr_db: float
    """Mean over the images in dB; nan without images."""


def reconstruct(config: ReconstructConfig, team: Team = ALONE) -> Reconstructed:
    """Writes this rank's blocks of images; when all ranks are done, rank 0 writes the manifest.

    Images that an earlier run of the same autoencoder wrote are kept. All ranks return the result of the whole set.
    Raises UserError: no autoencoder, no images, two files that would get one name, a set by another autoencoder
    in `out`.
    """
    names = image_names(config.images)
    if team.rank == 0:
        _claim(config)
    team.barrier()  # until then no rank writes into a folder that rank 0 may refuse
    mine = share(_blocks(names, config.batch_images), team.rank, team.world)
    found: list[_Share] = team.gather(_reconstruct_share(config, mine, team.rank))
    unreadable = {name: line for part in found for name, line in part.unreadable.items()}
    items = [_item(config, name, path) for name, path in names.items() if name not in unreadable]
    if team.rank == 0:
        write_manifest(config.out, items)
    # fsum is exact: the mean does not depend on which rank found which value.
    total = math.fsum(value for part in found for value in part.psnr_db)
    mean = total / len(items) if items else math.nan
    return Reconstructed(len(items), tuple(unreadable[name] for name in names if name in unreadable), mean)


@dataclass(frozen=True)
class _Share:
    """The result of one rank's blocks."""

    psnr_db: list[float]
    unreadable: dict[str, str]  # name -> one line


def _reconstruct_share(config: ReconstructConfig, mine: Sequence[_Block], rank: int) -> _Share:
    model = load_autoencoder(config.autoencoder).to(config.device)
    todo = [block for block in mine if not all(_is_done(config, name) for name, _ in block)]
    num_images = sum(map(len, todo))
    kept = sum(map(len, mine)) - num_images
    progress = ProgressLine(f"rank {rank}: {num_images} to reconstruct, {kept} kept", "images")
    values: dict[str, float] = {}
    unreadable: dict[str, str] = {}
    done = 0
    for block, batch in zip(todo, _read_ahead(todo, model.config.image_px), strict=True):
        for name, path in block:
            if name in batch.unreadable and not _is_done(config, name):  # an earlier run may have written it
                unreadable[name] = f"{path}: no readable image ({batch.unreadable[name]})"
                say(unreadable[name], sys.stderr)
        values |= _write(config, model, batch)
        done += len(block)
        progress.show(done, done / num_images)
    for name, path in (image for block in mine for image in block):
        if name not in values and name not in unreadable:
            values[name] = _psnr_db(config.out, _item(config, name, path))
    return _Share(list(values.values()), unreadable)


def image_names(images: Path) -> dict[str, Path]:
    """Name in the set -> file, in the order of the files. Raises UserError: no images, two files with one name."""
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; give --images the folder that holds the images")
    found = images_below(images)
    if not found.names:
        raise UserError(f"{images}: holds no image; supported: {', '.join(IMAGE_PARTS)}")
    names: dict[str, Path] = {}
    for path in found.paths:
        name = path.relative_to(images).with_suffix("").as_posix()
        if name in names:
            raise UserError(
                f"{path} and {names[name].name}: both would become {name}.png; rename one of them"
            )
        names[name] = path
    return names


def _claim(config: ReconstructConfig) -> None:
    """Writes a note to `out` of the autoencoder that fills it."""
    path, made_by = config.out / SOURCE_NAME, {"autoencoder": fingerprint(config.autoencoder)}
    if config.images.resolve().is_relative_to(config.out.resolve()):
        raise UserError(f"--out {config.out}: holds the input, {config.images}; give another --out")
    names = (*ROLES, "latents", MANIFEST_NAME, SOURCE_NAME)
    files.check_claim(config.out, "reconstruct", names, _is_own)
    if path.is_file() and files.read_json(path) != made_by:
        raise UserError(f"{config.out}: holds reconstructions by another autoencoder; give another --out")
    files.claim(config.out, "reconstruct", names, _is_own)
    files.write_json(path, made_by)


def _is_own(out: Path) -> bool:
    """Whether an earlier version, which left no marker file, wrote there."""
    try:
        return set(files.read_json(out / SOURCE_NAME)) == {"autoencoder"}
    except (OSError, ValueError, TypeError):
        return False


def _item(config: ReconstructConfig, name: str, path: Path) -> Item:
    images = {role: _image(role, name) for role in ROLES}
    return Item(name, images, {"file": str(path.relative_to(config.images))})


def _blocks(names: dict[str, Path], batch_images: int) -> list[_Block]:
    images = list(names.items())
    return [images[start : start + batch_images] for start in range(0, len(images), batch_images)]


def _is_done(config: ReconstructConfig, name: str) -> bool:
    wanted = [_image(role, name) for role in ROLES] + ([_latent(name)] if config.save_latents else [])
    return all((config.out / file).is_file() for file in wanted)


@dataclass(frozen=True)
class _Batch:
    names: list[str]
    pixels: list[Tensor]  # uint8 [3, H, W] of each name
    unreadable: dict[str, str]  # name -> why


def _read_ahead(blocks: Sequence[_Block], image_px: int) -> Iterator[_Batch]:
    """Yields the images of every block, while a thread reads the next block."""
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = [reader.submit(_read, block, image_px) for block in blocks[:1]]
        for block in blocks[1:]:
            ready = pending.pop().result()
            pending.append(reader.submit(_read, block, image_px))
            yield ready
        yield from (last.result() for last in pending)


def _read(block: _Block, image_px: int) -> _Batch:
    batch = _Batch([], [], {})
    for name, path in block:
        try:
            pixels = fit_image(to_rgb(open_image_file(path)), image_px)
        except (OSError, ValueError) as error:
            batch.unreadable[name] = " ".join(str(error).split())
        else:
            batch.names.append(name)
            batch.pixels.append(pixels)
    return batch


@torch.inference_mode()
def _write(config: ReconstructConfig, model: ImageAutoencoder, batch: _Batch) -> dict[str, float]:
    """Writes what is missing of a batch, the result last; returns the PSNR in dB of each image that was written."""
    missing = [index for index, name in enumerate(batch.names) if not _is_done(config, name)]
    if not missing:  # the block holds an unreadable file, so it is never finished
        return {}
    originals = torch.stack(batch.pixels)
    z_BCYX = model.encode(originals.to(config.device).float() / 255)
    results = to_uint8(model.decode(z_BCYX)).cpu()
    for index in missing:
        name = batch.names[index]
        if config.save_latents:
            file = io.BytesIO()
            np.save(file, z_BCYX[index].float().cpu().numpy())
            files.write_bytes(config.out / _latent(name), file.getvalue())
        write_image(config.out / _image("original", name), originals[index])
        write_image(config.out / _image("result", name), results[index])
    values = psnr_db(results, originals).tolist()
    return {batch.names[index]: values[index] for index in missing}


def _psnr_db(out: Path, item: Item) -> float:
    """PSNR in dB of an image that was written earlier."""
    images = ImageSet(out, (item,))
    result, original = (images.read(item, role)[None] for role in ("result", "original"))
    return float(psnr_db(result, original).item())


def _image(role: str, name: str) -> str:
    return f"{role}/{name}.png"


def _latent(name: str) -> str:
    return f"latents/{name}.npy"
