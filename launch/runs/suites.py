"""The suites of launch/evaluate.py and of a training's evaluation: for each its options, and a case of `build`.

Functions import the networks' libraries, so that --help does not wait for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from base.bounds import Few
from base.config import UserError
from evaluation.config import KEY_VARIABLE, Distances, Head

if TYPE_CHECKING:
    from evaluation.features.interface import FeatureExtractor
    from evaluation.judges.interface import Decoding, VisionLanguageJudge
    from evaluation.runner import Suite

NONE = "none"
DOWNLOAD = "download"
UNTOUCHED = "dinov2-b-reg"


@dataclass(frozen=True, kw_only=True)
class ReconstructionOptions:
    """Results beside their originals: PSNR, SSIM, LPIPS, rFID."""

    inception: str = DOWNLOAD
    """FID's network: download, the path of the file, or none."""
    vgg16: str = DOWNLOAD
    """LPIPS's network: download, the path of the file, or none."""
    features: str | None = None
    """An export whose encoder gives a feature distance."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Samples against a reference: FID, sFID, inception score, precision, recall, KID, FD-DINOv2, CMMD."""

    reference: Path
    """ADM's .npz, an image set or a folder of images."""
    reference_store: Path | None = None
    """Folder of the reference's features, for many runs; without it: the store."""
    inception: str = DOWNLOAD
    """FID's network: download, the path of the file, or none."""
    dinov2: str = NONE
    """DINOv2 ViT-L/14 for FD-DINOv2: download, the path of the folder, or none."""
    clip: str = NONE
    """CLIP ViT-L/14 at 336 px for CMMD: download, the path of the folder, or none."""
    features: str | None = None
    """An export whose encoder gives a feature distance."""
    distances: Distances = "fp32"
    """Precision of the distances for precision and recall; ADM: fp16."""


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """ImageNet's validation folders: top-1 of DINOv2's published head on an encoder."""

    autoencoder: str
    """Export whose encoder is probed, or dinov2-b-reg, untouched."""
    head: Head = "dinov2_vitb14_reg4"
    """Published head."""
    head_weights: str = DOWNLOAD
    """The head's weights: download, or the path of the .pth."""
    model_weights: str = DOWNLOAD
    """The pretrained model's weights: download, or the path of the file."""


@dataclass(frozen=True, kw_only=True)
class GenEvalOptions:
    """Images of GenEval's prompts."""

    detector: str = DOWNLOAD
    """The Mask2Former: download, or the path of its folder."""
    colour_model: str = DOWNLOAD
    """The CLIP ViT-L/14: download, or the path of its folder."""


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Options of every suite with a vision-language model as judge."""

    judge: str = "Qwen/Qwen3-VL-8B-Instruct"
    """Name or folder of a vision-language model."""
    judge_adapter: Path | None = None
    """Folder of a LoRA of the judge, such as EditScore's."""
    judge_name: str | None = None
    """Part of the metrics' names; without it the model's name."""
    endpoint: str | None = None
    """OpenAI-compatible address, up to /v1, that serves --judge."""
    key_variable: str = KEY_VARIABLE
    """Environment variable with the endpoint's key."""
    expect_sha256: str | None = None
    """Hash that the benchmark's given file must have."""


@dataclass(frozen=True, kw_only=True)
class DpgOptions(JudgeOptions):
    """Images of DPG-Bench's prompts."""

    questions: Path | None = None
    """The file dpg_bench.csv; without it a download."""
    official_faults: bool = False
    """Repeat the official script's faults."""


@dataclass(frozen=True, kw_only=True)
class GEditOptions(JudgeOptions):
    """Edits of GEdit-Bench's images."""

    instructions: Path | None = None
    """EditScore's vie_prompts.py; without it a download."""
    passes: Few = 1
    """Judgments of each edit."""


@dataclass(frozen=True, kw_only=True)
class ImgEditOptions(JudgeOptions):
    """Edits of ImgEdit-Bench's images."""

    instructions: Path | None = None
    """ImgEdit's prompts.json; without it a download."""


SuiteOptions = (
    ReconstructionOptions
    | GenerationOptions
    | LinearOptions
    | GenEvalOptions
    | DpgOptions
    | GEditOptions
    | ImgEditOptions
)
SUITES: Mapping[str, type[SuiteOptions]] = {
    "reconstruction": ReconstructionOptions,
    "generation": GenerationOptions,
    "linear": LinearOptions,
    "geneval": GenEvalOptions,
    "dpg": DpgOptions,
    "gedit": GEditOptions,
    "imgedit": ImgEditOptions,
}


def build(options: SuiteOptions, store: Path, device: str) -> Suite:
    """The suite with its networks. `store`: folder of features and judgments. Raises UserError: a file is missing."""
    from evaluation import benchmark_files
    from evaluation.features.inception import AdmInception, InceptionFeatures
    from evaluation.features.representation import RepresentationFeatures
    from evaluation.features.vision_transformers import VisionFeatures
    from evaluation.judge_instructions import ImgEditInstructions, VieInstructions
    from evaluation.judges.colour import ClipColours
    from evaluation.judges.detector import Mask2FormerDetector
    from evaluation.judges.interface import EDITSCORE, YES_NO
    from evaluation.linear_head import HeadClassifier, LinearHead
    from evaluation.metrics.reconstruction import Lpips
    from evaluation.reference import Reference
    from evaluation.suites.dpg import DpgSuite
    from evaluation.suites.edit_benchmarks import GEditSuite, ImgEditSuite
    from evaluation.suites.generation import GenerationSuite, Spaces
    from evaluation.suites.geneval import GenEvalSuite
    from evaluation.suites.linear_probe import LinearProbeSuite
    from evaluation.suites.reconstruction import ReconstructionSuite
    from tokenizer.config import RepresentationConfig
    from tokenizer.representation import Representation
    from tokenizer.rpiae import Autoencoder

    match options:
        case ReconstructionOptions():
            distances: dict[str, FeatureExtractor] = {}
            if options.inception != NONE:
                distances["rfid"] = InceptionFeatures.load(options.inception, device)
            if options.features is not None:
                distances["feature_distance"] = RepresentationFeatures.load(options.features, device=device)
            lpips = None if options.vgg16 == NONE else Lpips.load(options.vgg16, device)
            return ReconstructionSuite(store, lpips, distances)
        case GenerationOptions():
            local, vision = options.features, VisionFeatures.load
            spaces = Spaces(
                None if options.inception == NONE else AdmInception.load(options.inception, device),
                None if options.dinov2 == NONE else vision("dinov2", options.dinov2, device),
                None if options.clip == NONE else vision("clip", options.clip, device),
                None if local is None else RepresentationFeatures.load(local, device=device),
            )
            reference, kept = Reference.open(options.reference), options.reference_store
            return GenerationSuite(reference, spaces, store, kept, distances=options.distances, device=device)
        case LinearOptions():
            head = LinearHead.load(options.head, options.head_weights, options.model_weights)
            if options.autoencoder == UNTOUCHED:
                encoder = Representation(RepresentationConfig(UNTOUCHED))
            else:
                encoder = Autoencoder.load(options.autoencoder).encoder
            return LinearProbeSuite(HeadClassifier(encoder, head, device), store)
        case GenEvalOptions():
            detector = Mask2FormerDetector.load(options.detector, device)
            return GenEvalSuite(detector, ClipColours.load(options.colour_model, device), store)
        case DpgOptions():
            table = benchmark_files.obtain("dpg", options.questions, options.expect_sha256)
            judge = _judge(options, device, YES_NO)
            return DpgSuite(table, judge, store, official_faults=options.official_faults)
        case GEditOptions():
            path = benchmark_files.obtain("gedit_instructions", options.instructions, options.expect_sha256)
            judge = _judge(options, device, EDITSCORE)
            return GEditSuite(VieInstructions.read(path), judge, store, num_passes=options.passes)
        case ImgEditOptions():
            path = benchmark_files.obtain("imgedit_instructions", options.instructions, options.expect_sha256)
            return ImgEditSuite(ImgEditInstructions.read(path), _judge(options, device, EDITSCORE), store)


def _judge(options: JudgeOptions, device: str, decoding: Decoding) -> VisionLanguageJudge:
    from evaluation.judges.endpoint import EndpointJudge
    from evaluation.judges.vision_language import TransformersJudge

    model, name = options.judge, options.judge_name
    if options.endpoint is None:
        adapter = options.judge_adapter
        return TransformersJudge.load(model, adapter=adapter, name=name, decoding=decoding, device=device)
    if options.judge_adapter is not None:
        raise UserError("--judge-adapter is for a local judge; serve the merged model behind the endpoint")
    return EndpointJudge(
        options.endpoint, model, name=name, decoding=decoding, key_variable=options.key_variable
    )
