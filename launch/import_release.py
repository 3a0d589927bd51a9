"""Converts released weights to our export: launch/import_release.py rpiae|rae|diffusers|va-vae|bagel|dit (--help)"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from base import files
from base.config import UserError, load
from base.terminal import say
from launch.runs import entry
from tokenizer.config import AutoencoderConfig

if TYPE_CHECKING:
    from data.shards import LatentInfo
    from generator.class_conditional.model import ClassGenerator
    from generator.import_result import ImportedGenerator
    from generator.model import Generator
    from tokenizer.releases.import_result import Imported

    AnyImport = Imported | ImportedGenerator[Generator] | ImportedGenerator[ClassGenerator]


def main() -> None:
    """Reads, reports and writes the weights. If a tensor of either side has no counterpart: status 1, no output."""
    arguments = _parser().parse_args()
    out: Path | None = arguments.out
    if out is None and not arguments.verify:
        raise UserError("give --out, the folder to write, or --verify to look only")
    if out is not None:
        files.check_new(out)
    imported = _import(arguments)
    if arguments.verify or imported.report.problems:
        say("\n".join(imported.report.lines()))
    if imported.report.problems:
        raise SystemExit(1)
    if out is not None:
        with files.directory(out) as temporary:
            what = imported.write(temporary)
        say(f"{out}: {what}")


def _import(arguments: argparse.Namespace) -> AnyImport:
    """Reads the weights, and what became of each of their tensors."""
    is_configured = getattr(arguments, "config", None) is not None
    config = load(AutoencoderConfig, arguments.config) if is_configured else None
    entry.use_torch()
    from generator.bagel import import_bagel
    from generator.class_conditional.published import import_dit
    from tokenizer.releases.kl import import_diffusers, import_va_vae
    from tokenizer.releases.rpiae import RAE, RPIAE, import_rpiae

    match arguments.command:
        case "rpiae":
            return import_rpiae(arguments.source, config or RPIAE)
        case "rae":
            return import_rpiae(arguments.source, config or RAE)
        case "diffusers":
            return import_diffusers(arguments.source, arguments.image_px, arguments.subfolder)
        case "va-vae":
            return import_va_vae(arguments.source, arguments.image_px)
        case "bagel":
            return import_bagel(arguments.source, _latents(arguments.latents))
        case _:
            return import_dit(arguments.source, _latents(arguments.latents))


def _latents(directory: str) -> LatentInfo:
    from data.shards import ShardDataset

    latents = ShardDataset.open(directory).manifest.latent
    if latents is None:
        raise UserError(f"{directory}: holds pixels, not latents; give the latents it is to draw")
    return latents


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    rpiae = commands.add_parser("rpiae", help="a checkpoint of 360CVGroup/RPiAE")
    rae = commands.add_parser(
        "rae", help="a decoder of nyu-visionx/RAE-collections, with its untouched encoder"
    )
    diffusers = commands.add_parser("diffusers", help="an AutoencoderKL of diffusers: SD-VAE, Flux-VAE")
    va_vae = commands.add_parser("va-vae", help="VA-VAE's checkpoint (LightningDiT)")
    bagel = commands.add_parser("bagel", help="a generator with Bagel's names, to train on from")
    bagel.add_argument("--source", type=Path, required=True, help="folder: ema.safetensors, llm_config.json")
    dit = commands.add_parser("dit", help="a class-conditional LightningDiT or DiTDH of RPiAE or RAE")
    for command in (bagel, dit):
        command.add_argument(
            "--latents", required=True, help="latent shards that it is to draw, with as many channels"
        )
    for command in (rpiae, rae, va_vae, dit):
        command.add_argument(
            "--source", type=Path, required=True, help="weights: torch.save's or safetensors"
        )
    diffusers.add_argument("--source", required=True, help="folder, or name on the Hugging Face hub")
    diffusers.add_argument("--subfolder", help="of the VAE inside it: vae for Flux")
    for command in (rpiae, rae):
        command.add_argument(
            "--config", help="YAML of representation, decoder, image_px, bridge; else the release's"
        )
    for command in (diffusers, va_vae):
        command.add_argument("--image-px", type=int, default=256, help="side of the images to encode")
    for command in (rpiae, rae, diffusers, va_vae, bagel, dit):
        command.add_argument("--out", type=Path, help="folder of the export")
        command.add_argument("--verify", action="store_true", help="print the table of all parameters")
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
