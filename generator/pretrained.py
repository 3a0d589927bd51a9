"""A folder with everything that draws images, as launch/export.py writes it, here or on the Hugging Face hub.

generator/        model.safetensors, config.json
autoencoder/      model.safetensors, config.json
text_tokenizer/   its own files
sampling.json     how the training drew its samples
README.md         the model card

Only tensors and JSON are read: nothing is unpickled, no code of the folder is run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from base import hub
from base.config import UserError, from_dict
from base.files import read_object
from generator.config import AUTOENCODER, GENERATOR, SAMPLING, TEXT_TOKENIZER
from generator.pipeline import Pipeline
from generator.sampling_config import SamplingConfig

WEIGHTS = ("model.safetensors", "config.json")
"""Files of the generator's folder and of the autoencoder's."""
PATTERNS = [
    SAMPLING,
    *(f"{part}/{name}" for part in (GENERATOR, AUTOENCODER) for name in WEIGHTS),
    *(f"{TEXT_TOKENIZER}/*.{ending}" for ending in ("json", "txt", "jinja", "model")),
]


def load_pretrained(
    name_or_folder: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[Pipeline, SamplingConfig]:
    """Loads the pipeline and the sampling it was made for; `revision`: of a name on the hub.

    Raises UserError: neither a folder nor a name that can be downloaded, a missing file, parts that do not match.
    """
    folder = hub.folder(name_or_folder, PATTERNS, revision)
    sampling = folder / SAMPLING
    if not sampling.is_file():
        raise UserError(f"{sampling}: no such file; give a folder that launch/export.py wrote, or its name")
    pipeline = Pipeline.load(folder / GENERATOR, folder / AUTOENCODER, folder / TEXT_TOKENIZER, device=device)
    return pipeline, from_dict(SamplingConfig, read_object(sampling), where=str(sampling))
