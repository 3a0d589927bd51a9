"""A folder of images -> their reconstructions by any autoencoder, as an image set that suites score.

The set holds original/NAME.png (cropped and resized as the autoencoder sees it), result/NAME.png, if wanted
latents/NAME.npy, and manifest.jsonl; NAME is the path below the folder, without the suffix.

Shapes: B images, C latent channels, Y X latent grid, H W pixels.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import IMAGE_PARTS, fit_image, read_rgb
from data.progress import ProgressLine
from engine import files
from engine.config import UserError
from evaluation.manifest import ImageSet, Item, write_image, write_manifest
from evaluation.metrics.psnr import psnr_db, to_uint8
from tokenizer.autoencoders import load_autoencoder
from tokenizer.export import ImageAutoencoder, fingerprint

SOURCE_NAME = "reconstruct.json"
ROLES = ("original", "result")


@dataclass(frozen=True)
class ReconstructConfig:
    """What is reconstructed."""

    autoencoder: Path
    """Directory of any exported or imported autoencoder."""
    images: Path
    """Folder of images, also in folders below it."""
    out: Path
    """Folder of the image set."""
    save_latents: bool = False
    """Also write every latent, float32 [C, Y, X]."""
    batch_images: int = 16
    """Images per forward pass."""
    device: str = "cpu"
    """Where the autoencoder runs."""


@dataclass(frozen=True)
class Reconstructed:
    """What came of it."""

    num_images: int
    """Images in the set, with those of an earlier run."""
    unreadable: tuple[str, ...]
    """One line for each file that is no readable image."""
    psnr_db: float
    """Mean over the images; nan without any."""


def reconstruct(config: ReconstructConfig) -> Reconstructed:
    """Writes the set. Images that an earlier run of the same autoencoder wrote are kept; the manifest comes last.

    Raises UserError: no autoencoder, no images, two files that would become the same, a set by another
    autoencoder in `out`.
    """
    names = _names(config.images)
    _claim(config)
    model = load_autoencoder(config.autoencoder).to(config.device)
    todo = [(name, path) for name, path in names.items() if not _is_done(config, name)]
    progress = ProgressLine(f"{len(todo)} to reconstruct, {len(names) - len(todo)} kept", "images")
    values: dict[str, float] = {}
    unreadable: dict[str, str] = {}
    for batch in _read_ahead(todo, model.config.image_px, config.batch_images):
        for name, reason in batch.unreadable.items():
            unreadable[name] = f"{names[name]}: no readable image ({reason})"
            print(unreadable[name], file=sys.stderr, flush=True)
        if batch.names:
            values |= _write(config, model, batch)
        done = len(values) + len(unreadable)
        progress.show(done, done / len(todo))
    items = [
        Item(
            name, {role: _image(role, name) for role in ROLES}, {"file": str(path.relative_to(config.images))}
        )
        for name, path in names.items()
        if name not in unreadable
    ]
    write_manifest(config.out, items)
    images = ImageSet(config.out, tuple(items))
    for item in items:
        if item.key not in values:
            result, original = (images.read(item, role)[None] for role in ("result", "original"))
            values[item.key] = psnr_db(result, original).item()
    mean = float(np.mean([values[item.key] for item in items])) if items else float("nan")
    return Reconstructed(len(items), tuple(unreadable.values()), mean)


def _names(images: Path) -> dict[str, Path]:
    """Name in the set -> file, in the order of the names."""
    if not images.is_dir():
        raise UserError(f"{images}: no such folder; give --images the folder that holds the images")
    found = sorted(path for path in images.rglob("*") if path.suffix.lower().lstrip(".") in IMAGE_PARTS)
    if not found:
        raise UserError(f"{images}: holds no image; supported: {', '.join(IMAGE_PARTS)}")
    names: dict[str, Path] = {}
    for path in found:
        name = path.relative_to(images).with_suffix("").as_posix()
        if name in names:
            raise UserError(
                f"{path} and {names[name].name}: both would become {name}.png; rename one of them"
            )
        names[name] = path
    return names


def _claim(config: ReconstructConfig) -> None:
    """Notes in `out` which autoencoder wrote it."""
    path, made_by = config.out / SOURCE_NAME, {"autoencoder": fingerprint(config.autoencoder)}
    if path.is_file() and files.read_json(path) != made_by:
        raise UserError(f"{config.out}: holds reconstructions by another autoencoder; give another --out")
    files.write_json(path, made_by)


def _is_done(config: ReconstructConfig, name: str) -> bool:
    wanted = [_image(role, name) for role in ROLES] + ([_latent(name)] if config.save_latents else [])
    return all((config.out / file).is_file() for file in wanted)


@dataclass(frozen=True)
class _Batch:
    names: list[str]
    pixels: list[Tensor]  # uint8 [3, H, W] of each name
    unreadable: dict[str, str]  # name -> why


def _read_ahead(todo: Sequence[tuple[str, Path]], image_px: int, batch_images: int) -> Iterator[_Batch]:
    """The images in batches, while a thread reads the next one."""
    parts = [todo[i : i + batch_images] for i in range(0, len(todo), batch_images)]
    with ThreadPoolExecutor(max_workers=1) as reader:
        pending = [reader.submit(_read, part, image_px) for part in parts[:1]]
        for part in parts[1:]:
            ready = pending.pop().result()
            pending.append(reader.submit(_read, part, image_px))
            yield ready
        yield from (last.result() for last in pending)


def _read(part: Sequence[tuple[str, Path]], image_px: int) -> _Batch:
    batch = _Batch([], [], {})
    for name, path in part:
        try:
            pixels = fit_image(read_rgb(io.BytesIO(path.read_bytes())), image_px)
        except (OSError, ValueError) as error:
            batch.unreadable[name] = " ".join(str(error).split())
        else:
            batch.names.append(name)
            batch.pixels.append(pixels)
    return batch


@torch.inference_mode()
def _write(config: ReconstructConfig, model: ImageAutoencoder, batch: _Batch) -> dict[str, float]:
    """Writes a batch, the result last; returns each image's PSNR in dB."""
    originals = torch.stack(batch.pixels)
    z_BCYX = model.encode(originals.to(config.device).float() / 255)
    results = to_uint8(model.decode(z_BCYX)).cpu()
    for index, name in enumerate(batch.names):
        if config.save_latents:
            file = io.BytesIO()
            np.save(file, z_BCYX[index].float().cpu().numpy())
            files.write_bytes(config.out / _latent(name), file.getvalue())
        write_image(config.out / _image("original", name), originals[index])
        write_image(config.out / _image("result", name), results[index])
    return dict(zip(batch.names, psnr_db(results, originals).tolist(), strict=True))


def _image(role: str, name: str) -> str:
    return f"{role}/{name}.png"


def _latent(name: str) -> str:
    return f"latents/{name}.npy"
