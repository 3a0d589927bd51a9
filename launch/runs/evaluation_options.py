"""The options of launch/evaluate.py, and the suite that each of its commands builds from them."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from base import files
from base.config import UserError
from base.team import Team
from base.terminal import say
from data.image_set import MANIFEST_NAME, write_class_folders
from data.samples.images import IMAGE_PARTS
from evaluation import benchmark_files, prompt_sets
from evaluation.calibration import KNOWN, known_of
from evaluation.features.inception import AdmInception, InceptionFeatures
from evaluation.features.interface import FeatureExtractor
from evaluation.features.representation import RepresentationFeatures
from evaluation.features.vision_transformers import Kind, VisionFeatures
from evaluation.image_source import NPZ_NAME, write_npz_set
from evaluation.judge_instructions import ImgEditInstructions, VieInstructions
from evaluation.judges.colour import ClipColours
from evaluation.judges.detector import Mask2FormerDetector
from evaluation.judges.endpoint import KEY_VARIABLE, EndpointJudge
from evaluation.judges.interface import EDITSCORE, YES_NO, Decoding, VisionLanguageJudge
from evaluation.judges.vision_language import TransformersJudge
from evaluation.linear_head import HEADS, NUM_CLASSES, HeadClassifier, LinearHead
from evaluation.metrics.lpips import Lpips
from evaluation.metrics.manifold import Distances
from evaluation.reference import Reference
from evaluation.runner import SCORES_NAME, Suite
from evaluation.suites.dpg import DpgSuite
from evaluation.suites.edit_benchmarks import GEditSuite, ImgEditSuite
from evaluation.suites.generation import GenerationSuite, Spaces
from evaluation.suites.geneval import GenEvalSuite
from evaluation.suites.linear_probe import LinearProbeSuite
from evaluation.suites.reconstruction import ReconstructionSuite
from launch.runs.sampling_options import add_sampling_options
from report.benchmarks import MAX_FAILED
from tokenizer.config import RepresentationConfig
from tokenizer.representation import Representation
from tokenizer.rpiae import Autoencoder

NONE = "none"
DOWNLOAD = "download"
UNTOUCHED = "dinov2-b-reg"
JUDGE = "Qwen/Qwen3-VL-8B-Instruct"


def _reconstruction(arguments: argparse.Namespace, device: str) -> Suite:
    distances: dict[str, FeatureExtractor] = {}
    if arguments.inception != NONE:
        distances["rfid"] = InceptionFeatures.load(arguments.inception, device)
    if arguments.features is not None:
        distances["feature_distance"] = RepresentationFeatures.load(arguments.features, device=device)
    lpips = None if arguments.vgg16 == NONE else Lpips.load(arguments.vgg16, device)
    return ReconstructionSuite(_store(arguments), lpips, distances)


def _generation(arguments: argparse.Namespace, device: str) -> Suite:
    def vision(kind: Kind, name: str) -> FeatureExtractor | None:
        return None if name == NONE else VisionFeatures.load(kind, name, device)

    local = arguments.features
    spaces = Spaces(
        inception=None if arguments.inception == NONE else AdmInception.load(arguments.inception, device),
        dinov2=vision("dinov2", arguments.dinov2),
        clip=vision("clip", arguments.clip),
        other=None if local is None else RepresentationFeatures.load(local, device=device),
    )
    reference = Reference.open(arguments.reference)
    return GenerationSuite(
        reference,
        spaces,
        _store(arguments),
        arguments.reference_store,
        distances=arguments.distances,
        device=device,
    )


def _linear(arguments: argparse.Namespace, device: str) -> Suite:
    head = LinearHead.load(arguments.head, arguments.head_weights, arguments.model_weights)
    if str(arguments.autoencoder) == UNTOUCHED:
        encoder = Representation(RepresentationConfig(UNTOUCHED))
    else:
        encoder = Autoencoder.load(arguments.autoencoder).encoder
    return LinearProbeSuite(HeadClassifier(encoder, head, device), _store(arguments))


def _geneval(arguments: argparse.Namespace, device: str) -> Suite:
    detector = Mask2FormerDetector.load(arguments.detector, device)
    return GenEvalSuite(detector, ClipColours.load(arguments.colour_model, device), _store(arguments))


def _dpg(arguments: argparse.Namespace, device: str) -> Suite:
    table = benchmark_files.obtain("dpg", arguments.questions, arguments.expect_sha256)
    judge = _judge(arguments, device, YES_NO)
    return DpgSuite(table, judge, _store(arguments), official_faults=arguments.official_faults)


def _gedit(arguments: argparse.Namespace, device: str) -> Suite:
    path = benchmark_files.obtain("gedit_instructions", arguments.instructions, arguments.expect_sha256)
    judge = _judge(arguments, device, EDITSCORE)
    return GEditSuite(VieInstructions.read(path), judge, _store(arguments), num_passes=arguments.passes)


def _imgedit(arguments: argparse.Namespace, device: str) -> Suite:
    path = benchmark_files.obtain("imgedit_instructions", arguments.instructions, arguments.expect_sha256)
    return ImgEditSuite(
        ImgEditInstructions.read(path), _judge(arguments, device, EDITSCORE), _store(arguments)
    )


SUITES: Mapping[str, Callable[[argparse.Namespace, str], Suite]] = {
    "reconstruction": _reconstruction,
    "generation": _generation,
    "linear": _linear,
    "geneval": _geneval,
    "dpg": _dpg,
    "gedit": _gedit,
    "imgedit": _imgedit,
}


def prepare_images(arguments: argparse.Namespace, team: Team) -> tuple[Path, Path | None]:
    """The folder of the image set (--images, or one made from it in --out), and its manifest (None: the folder's own).

    Rank 0 makes the folder and the manifest. Raises UserError: another number of class folders than the head has.
    """
    manifest: Path | None = arguments.manifest
    images: Path = arguments.images
    made = arguments.out / "images"
    if team.rank == 0 and (arguments.command == "linear" or images.suffix == ".npz"):
        left = (
            made / NPZ_NAME,
            arguments.out / SCORES_NAME,
        )  # written by an earlier version, without a marker
        files.claim(
            made,
            "evaluate",
            ("*.png", MANIFEST_NAME, NPZ_NAME),
            lambda _: any(path.is_file() for path in left),
        )
    if arguments.command == "linear":
        if team.rank == 0:
            num_classes = write_class_folders(images, made, IMAGE_PARTS)
            if num_classes != NUM_CLASSES:  # labels are positions in the sorted list of folders
                raise UserError(f"{images}: {num_classes} class folders, the head names {NUM_CLASSES}")
        manifest = made / MANIFEST_NAME
    elif images.suffix == ".npz":
        if team.rank == 0:
            write_npz_set(images, made)
        images = made
    team.barrier()
    return images, manifest


def write_prompts(arguments: argparse.Namespace) -> None:
    """Writes a file of prompts for launch/sample.py."""
    out, given = arguments.out, arguments.file
    if arguments.benchmark in ("geneval", "geneval_rewritten"):
        say(benchmark_files.obtain(arguments.benchmark, given and given[0], arguments.expect_sha256))
        return
    if arguments.benchmark == "dpg":
        count = prompt_sets.write_dpg(
            benchmark_files.obtain("dpg", given and given[0], arguments.expect_sha256), out
        )
    elif arguments.benchmark == "gedit":
        if not given:
            raise UserError("gedit: give --file, the parquet files of stepfun-ai/GEdit-Bench")
        count = prompt_sets.write_gedit(given, out)
    else:
        if arguments.images is None:
            raise UserError("imgedit: give --images, the folder of ImgEdit-Bench's original images")
        edits = benchmark_files.obtain("imgedit", given and given[0], arguments.expect_sha256)
        count = prompt_sets.write_imgedit(edits, arguments.images, out)
    say(f"{out / prompt_sets.PROMPTS_NAME}: {count} lines")


def add_commands(parser: argparse.ArgumentParser) -> None:
    """Adds a command for every suite, and prompts, calibrate and report."""
    commands = parser.add_subparsers(dest="command", required=True)
    for name in SUITES:
        suite = commands.add_parser(name)
        _add_common(suite)
        if known := known_of(name):
            suite.add_argument(
                "--calibrate", choices=known, help="known set that --images are: compare at the end"
            )
        add_suite_options(name, suite)
    prompts = commands.add_parser("prompts").add_argument
    prompts("benchmark", choices=["geneval", "geneval_rewritten", "dpg", "gedit", "imgedit"])
    prompts("--file", type=Path, nargs="+", help="the benchmark's own (default: download, but for gedit)")
    prompts("--images", type=Path, help="imgedit: folder of the original images")
    prompts("--expect-sha256", help="hash that a given file must have")
    prompts("--out", type=Path, default=Path("prompts"), help="folder of prompts.jsonl")
    calibrate = commands.add_parser("calibrate").add_argument
    calibrate("known", choices=[one.name for one in KNOWN], help="image set that was scored")
    calibrate("--scores", type=Path, required=True, help="its scores.json")
    report = commands.add_parser("report").add_argument
    report("runs", type=Path, nargs="+", help="folders with a scores.json in or below them, one column each")
    report(
        "--images",
        type=Path,
        nargs="+",
        default=[],
        help="folders whose images may be shown, beside those of runs",
    )
    report("--max-failed", type=int, default=MAX_FAILED, help="failed items shown of each suite and run")
    report("--out", type=Path, required=True, help="the page, an .html file")


def add_suite_options(name: str, parser: argparse.ArgumentParser) -> None:
    """Adds the options of one suite besides images: references, networks, judges."""
    add = parser.add_argument
    if name in ("reconstruction", "generation"):
        add("--inception", default=DOWNLOAD, help=f"FID's network: {_source()}")
        add("--features", help="an export whose encoder gives a feature distance")
    if name == "reconstruction":
        add("--vgg16", default=DOWNLOAD, help=f"LPIPS's network: {_source()}")
    elif name == "generation":
        add(
            "--reference",
            type=Path,
            required=True,
            help="ADM's .npz, an image set or a folder of images",
        )
        add("--reference-store", type=Path, help="folder of its features, for many runs (default: the store)")
        add("--dinov2", default=NONE, help=f"DINOv2 ViT-L/14 for FD-DINOv2: {_source()} (default)")
        add("--clip", default=NONE, help=f"CLIP ViT-L/14 at 336 px for CMMD: {_source()} (default)")
        add(
            "--distances",
            choices=get_args(Distances),
            default="fp32",
            help="of precision and recall; ADM: fp16",
        )
    elif name == "linear":
        add(
            "--autoencoder",
            type=Path,
            required=True,
            help=f"export whose encoder is probed, or {UNTOUCHED}, untouched",
        )
        add("--head", default="dinov2_vitb14_reg4", choices=HEADS, help="published head")
        add("--head-weights", default=DOWNLOAD, help="or the path of its .pth")
        add("--model-weights", default=DOWNLOAD, help="or the pretrained model's file")
    elif name == "geneval":
        add("--detector", default=DOWNLOAD, help="or a folder of the Mask2Former")
        add("--colour-model", default=DOWNLOAD, help="or a folder of the CLIP ViT-L/14")
    else:
        _add_judge(parser)
    if name == "dpg":
        add("--questions", type=Path, help="dpg_bench.csv (default: download)")
        add("--official-faults", action="store_true", help="repeat the official script's")
    elif name == "gedit":
        add("--instructions", type=Path, help="EditScore's vie_prompts.py (default: download)")
        add("--passes", type=int, default=1, help="judgments of each edit")
    elif name == "imgedit":
        add("--instructions", type=Path, help="ImgEdit's prompts.json (default: download)")


def _add_common(suite: argparse.ArgumentParser) -> None:
    add = suite.add_argument
    add("--images", type=Path, required=True, help="folder of the image set; with --run it is drawn there")
    add("--manifest", type=Path, help="list of the items (default: manifest.jsonl in --images)")
    add("--out", type=Path, required=True, help="folder of scores.json and per_item.jsonl")
    add(
        "--store",
        type=Path,
        help="folder of features and judgments, kept for the next run (default: OUT/store)",
    )
    add("--allow-partial", action="store_true", help="score what is there and mark the scores partial")
    add("--run", type=Path, help="run_dir of a finished training that draws the images first")
    add("--prompts", type=Path, help="with --run: what to draw (generator/prompts.py)")
    add("--num-images", type=int, default=1, help="with --run: images of each prompt")
    add_sampling_options(suite, default="the run's preview_sampling")


def _add_judge(suite: argparse.ArgumentParser) -> None:
    add = suite.add_argument
    add("--judge", default=JUDGE, help=f"name or folder of a vision-language model (default {JUDGE})")
    add("--judge-adapter", type=Path, help="folder of a LoRA of it, such as EditScore's")
    add("--judge-name", help="part of the metrics' names (default: the model's)")
    add("--endpoint", help="OpenAI-compatible address, up to /v1, that serves --judge")
    add("--key-variable", default=KEY_VARIABLE, help="environment variable with the endpoint's key")
    add("--expect-sha256", help="hash that the benchmark's given file must have")


def _judge(arguments: argparse.Namespace, device: str, decoding: Decoding) -> VisionLanguageJudge:
    name = arguments.judge_name
    if arguments.endpoint is not None:
        if arguments.judge_adapter is not None:
            raise UserError(
                "--judge-adapter is for a local judge; serve the merged model behind the endpoint"
            )
        return EndpointJudge(
            arguments.endpoint,
            arguments.judge,
            name=name,
            decoding=decoding,
            key_variable=arguments.key_variable,
        )
    return TransformersJudge.load(
        arguments.judge, adapter=arguments.judge_adapter, name=name, decoding=decoding, device=device
    )


def _store(arguments: argparse.Namespace) -> Path:
    store: Path = arguments.store or arguments.out / "store"
    return store


def _source() -> str:
    return f"{DOWNLOAD}, the path of the file or folder, or {NONE}"
