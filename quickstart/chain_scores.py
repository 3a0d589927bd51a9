"""The quickstart's last step: makes image sets with the trained models and judges them."""

from __future__ import annotations

from pathlib import Path

from base.terminal import say
from engine.checkpoint_folder import EXPORT
from evaluation.features.representation import RepresentationFeatures
from evaluation.reference import Reference
from evaluation.runner import Suite, evaluate
from evaluation.suites.generation import GenerationSuite, Spaces
from evaluation.suites.reconstruction import ReconstructionSuite
from generator.pipeline import Pipeline
from quickstart import emoji_images
from quickstart.config import ChainScoresConfig
from quickstart.judge import Judge
from quickstart.suites.edits import EmojiEditSuite
from quickstart.suites.text_to_image import EmojiT2ISuite
from tokenizer.autoencoders import load_autoencoder

NOTES = [
    "A small ViT trained on emoji identity stands in for DINOv2, which cannot be downloaded everywhere.",
    "The perceptual loss compares features of that stand-in: LPIPS needs VGG16's weights, a download.",
    "The discriminator's frozen features are the stand-in's, where the paper uses DINOv2-S.",
]


def score(root: Path, config: ChainScoresConfig) -> None:
    """Makes the image sets and scores them into evaluation/{judge,reconstruction,t2i,generation,edit}.

    The judge also sees the reconstructions, because no drawing can be better than the decoder's images.
    """
    judge = Judge.load(root / "judge" / EXPORT)
    autoencoder_dir = root / "decoder" / EXPORT
    autoencoder = load_autoencoder(autoencoder_dir)
    scenes = emoji_images.read_samples(root / "data/scenes-validation", config.num_images)
    edits = emoji_images.read_samples(root / "data/edits-validation", config.num_edits)
    images, store = root / "evaluation" / "images", root / "evaluation" / "store"

    def scored(name: str, suite: Suite, seed: int = 0, images_name: str | None = None) -> None:
        scores = evaluate(suite, images / (images_name or name), root / "evaluation" / name, seed=seed)[
            "scores"
        ]
        say(
            "      "
            + name
            + ": "
            + ", ".join(f"{metric} {value['mean']:.3f}" for metric, value in scores.items())
        )

    emoji_images.real_renders(scenes, images / "judge", autoencoder.config.image_px)
    scored("judge", EmojiT2ISuite(judge))
    emoji_images.reconstructions(scenes, autoencoder, images / "reconstruction")
    scored("reconstruction", ReconstructionSuite(store))
    scored("judge_on_reconstructions", EmojiT2ISuite(judge), images_name="reconstruction")
    text_tokenizer = root / "text_tokenizer"
    t2i = Pipeline.load(root / "t2i" / EXPORT, autoencoder_dir, text_tokenizer)
    emoji_images.drawings(scenes, t2i, config.t2i, images / "t2i")
    scored("t2i", EmojiT2ISuite(judge), config.t2i.seed)
    features = RepresentationFeatures.load(root / "standin" / EXPORT)
    real = Reference.open(images / "judge")
    generation = GenerationSuite(real, Spaces(other=features), store)
    scored("generation", generation, config.t2i.seed, images_name="t2i")
    edit = Pipeline.load(root / "edit" / EXPORT, autoencoder_dir, text_tokenizer)
    emoji_images.edits(edits, edit, config.edit, images / "edit")
    scored("edit", EmojiEditSuite(judge), config.edit.seed)
