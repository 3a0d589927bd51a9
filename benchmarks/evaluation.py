"""Memory and time of the generation suite as the number of images grows: python -m benchmarks.evaluation

Small random images go through a network of two layers whose vectors are as long as Inception's (2048 for FID, 2023 for
sFID). The benchmark thus measures reading, TF1's resize, the store and the scores, not a network. Every size runs in a
process of its own, whose peak resident memory is read after features and after scores. Times are CPU seconds of one
thread, which other work on the machine disturbs less. The reference's features are not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from data.image_set import ImageSet, Item, write_image, write_manifest
from evaluation.environment import machine, versions
from evaluation.features.inception import INPUT_PX, NUM_FEATURES, AdmInception
from evaluation.reference import Reference
from evaluation.suites.generation import GenerationSuite, Spaces

SIZES = (1250, 2500, 5000)
IMAGE_PX = 64
REFERENCE_IMAGES = 1000
CELLS = 17
MIB = 2**20


class Network(nn.Module):
    """[B, 3, 299, 299] -> [B, 2048], through 17 x 17 cells of 8 channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 8, 11, stride=INPUT_PX // CELLS + 1)
        self.out = nn.Linear(8 * CELLS * CELLS, NUM_FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the cells, then one linear layer."""
        return torch.relu(self.out(torch.relu(self.layer(x)).flatten(1)))


def main() -> None:
    """Prints one line for each size, then the growth."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        print(json.dumps(_measure(arguments.worker, arguments.folder)))
        return
    print(f"machine: {machine()}\nversions: {versions()}")
    print(f"{IMAGE_PX} px images against {REFERENCE_IMAGES}; one process a size")
    rows = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable,
                "-m",
                "benchmarks.evaluation",
                "--worker",
                str(size),
                "--folder",
                folder,
            ]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603  # our own command
        rows.append(row)
        print(
            f"{size:>6,} images: features {row['features_s']:5.1f} CPU s, peak {row['features_mib']:.0f} MiB; "
            f"scores {row['scores_s']:5.1f} CPU s, peak {row['scores_mib']:.0f} MiB; store {row['store_mib']:.0f} MiB",
            flush=True,
        )
    for name, unit in (
        ("features_s", "s"),
        ("features_mib", "MiB"),
        ("scores_mib", "MiB"),
        ("store_mib", "MiB"),
    ):
        slope, start = np.polyfit(arguments.sizes, [row[name] for row in rows], 1)
        print(f"{name}: {1000 * slope:.3g} {unit} per 1,000 images, {start:.4g} {unit} at none")


def _measure(size: int, folder: Path) -> dict[str, float]:
    torch.set_num_threads(1)
    images = _write_set(folder / "set", size)
    pixels = np.random.default_rng(1).integers(0, 256, (REFERENCE_IMAGES, IMAGE_PX, IMAGE_PX, 3), np.uint8)
    np.savez(folder / "reference.npz", arr_0=pixels)
    network = Network()
    inception = AdmInception(network, network.layer, torch.randn(1008, NUM_FEATURES) / 50)
    suite = GenerationSuite(
        Reference.open(folder / "reference.npz"), Spaces(inception=inception), folder / "store"
    )
    suite.collect(images, images.items[:1], 0, 1)  # computes the reference's features too
    begin_s = time.process_time()
    suite.collect(images, images.items, 0, 1)
    features_s, features_mib = time.process_time() - begin_s, _peak_mib()
    begin_s = time.process_time()
    suite.measure(images, images.items)
    suite.measure_set(images, images.items)
    store = sum(path.stat().st_size for path in (folder / "store").rglob("*.f32"))
    return {
        "features_s": features_s,
        "features_mib": features_mib,
        "scores_s": time.process_time() - begin_s,
        "scores_mib": _peak_mib(),
        "store_mib": store / MIB,
    }


def _write_set(folder: Path, size: int) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    items = []
    for index in range(size):
        coarse = torch.randint(0, 256, (1, 3, 8, 8), generator=generator).float()
        pixels = nn.functional.interpolate(coarse, size=IMAGE_PX, mode="bilinear")[0].to(torch.uint8)
        write_image(folder / f"{index}.png", pixels)
        items.append(Item(str(index), {"result": f"{index}.png"}, {}))
    write_manifest(folder, items)
    return ImageSet.open(folder)


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
