"""Scores of a tokenizer: launch/evaluate.py reconstruction | linear (each with --help)

reconstruction: an image set as launch/reconstruct.py writes it -> PSNR, SSIM, and with their networks LPIPS and rFID.
linear: labelled images in one folder per class -> top-1 of DINOv2's published head on an autoencoder's encoder.
"""

import argparse
import sys
from pathlib import Path

import torch

from data.images import IMAGE_PARTS
from engine.config import UserError
from evaluation.features.inception import InceptionFeatures
from evaluation.features.interface import FeatureExtractor
from evaluation.features.representation import RepresentationFeatures
from evaluation.linear_head import HEADS, NUM_CLASSES, HeadClassifier, LinearHead
from evaluation.manifest import write_class_folders
from evaluation.metrics.lpips import Lpips
from evaluation.runner import evaluate
from evaluation.suites.linear_probe import LinearProbeSuite
from evaluation.suites.reconstruction import ReconstructionSuite
from launch import entry
from tokenizer.rpiae import Autoencoder

NONE = "none"


def main() -> None:
    """Scores, prints each mean with its interval; scores.json and per_item.jsonl in --out."""
    arguments = _parser().parse_args()
    scores = SUITES[arguments.suite](arguments)
    for name, value in scores.items():
        interval = "" if value["low"] is None else f" ({value['low']:.4g} to {value['high']:.4g})"
        print(f"{name}: {value['mean']:.4g}{interval}, n = {value['n']} {value.get('note', '')}".rstrip())


def _reconstruction(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    distances: dict[str, FeatureExtractor] = {}
    if arguments.inception != NONE:
        distances["rfid"] = InceptionFeatures.load(arguments.inception, _device())
    if arguments.features is not None:
        distances["feature_distance"] = RepresentationFeatures.load(arguments.features, device=_device())
    lpips = None if arguments.vgg16 == NONE else Lpips.load(arguments.vgg16, _device())
    suite = ReconstructionSuite(lpips, distances)
    return dict(evaluate(suite, arguments.images, arguments.out)["scores"])


def _linear(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    head = LinearHead.load(arguments.head, arguments.head_weights, arguments.model_weights)
    classifier = HeadClassifier(Autoencoder.load(arguments.autoencoder).encoder, head, _device())
    num_classes = write_class_folders(arguments.images, arguments.out / "images", IMAGE_PARTS)
    if num_classes != NUM_CLASSES:  # labels are places in the sorted list: they would name other classes
        raise UserError(f"{arguments.images}: {num_classes} class folders, the head names {NUM_CLASSES}")
    return dict(evaluate(LinearProbeSuite(classifier), arguments.out / "images", arguments.out)["scores"])


SUITES = {"reconstruction": _reconstruction, "linear": _linear}


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    suites = parser.add_subparsers(dest="suite", required=True)
    reconstruction, linear = (suites.add_parser(name) for name in SUITES)
    for suite in (reconstruction, linear):
        suite.add_argument("--images", type=Path, required=True)
        suite.add_argument("--out", type=Path, required=True, help="folder of scores.json and per_item.jsonl")
    source = "download, the path of the file, or none"
    reconstruction.add_argument("--inception", default="download", help=f"FID's network: {source}")
    reconstruction.add_argument("--vgg16", default="download", help=f"LPIPS's network: {source}")
    reconstruction.add_argument("--features", help="an export whose encoder gives a feature distance")
    linear.add_argument("--autoencoder", type=Path, required=True, help="export whose encoder is probed")
    linear.add_argument("--head", default="dinov2_vitb14_reg4", choices=HEADS, help="published head")
    linear.add_argument("--head-weights", default="download", help="or the path of its .pth")
    linear.add_argument("--model-weights", default="download", help="or the pretrained model's file")
    return parser


if __name__ == "__main__":
    sys.exit(entry.run(main))
