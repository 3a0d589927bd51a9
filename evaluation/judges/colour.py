"""Names colours of objects for GenEval: CLIP ViT-L/14 compares an object's crop with sentences about ten colours.

Everything outside the object's mask is painted grey (#999), then the object's box is cut out. A colour's direction is
the mean of three sentences' unit vectors. The published weights were trained with QuickGELU; a model with another
activation gives other colours and is refused.

Shapes: n crops, C colours, D embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import functional as transforms
from transformers import AutoTokenizer, CLIPModel

from base import files, hub
from base.config import UserError
from evaluation.judges.detector import FoundObject
from evaluation.metrics.geneval import COLOURS
from tokenizer.weights import freeze, state_hash

MODEL = "openai/clip-vit-large-patch14"
GREY = (0x99, 0x99, 0x99)
TEMPLATES = (
    "a photo of a {colour} {name}",
    "a photo of a {colour}-colored {name}",
    "a photo of a {colour} object",
)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ColourNamer(Protocol):
    """Names the colours of objects."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights, sentences and preparation."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The choices that decide the colours, in words, as JSON values."""

    def __call__(self, image: Tensor, objects: Sequence[FoundObject]) -> list[str]:
        """uint8 [3, H, W] and objects of one name in it -> one of COLOURS for each object."""


class ClipColours:
    """CLIP as a ColourNamer."""

    def __init__(self, model: Any, tokenizer: Any, device: str = "cpu", source: str = "given") -> None:
        """`model`: transformers' CLIPModel; `tokenizer`: the model's. Raises UserError: no QuickGELU."""
        activations = {model.config.text_config.hidden_act, model.config.vision_config.hidden_act}
        if activations != {"quick_gelu"}:
            raise UserError(
                f"{source}: its activation is {', '.join(sorted(activations))}; GenEval's colours need the CLIP of "
                "OpenAI, with quick_gelu"
            )
        self._device = torch.device(device)
        self._model = model.to(self._device)
        freeze(self._model)
        self._tokenizer = tokenizer
        self._input_px = int(model.config.vision_config.image_size)
        self._directions: dict[str, Tensor] = {}  # [C, D] by object name
        self.protocol: Mapping[str, Any] = {
            "network": source,
            "crop": "object's mask over #999, cut to its box, short side bicubic, centre",
            "sentences": list(TEMPLATES),
        }
        self.fingerprint = files.digest([state_hash(model), dict(self.protocol)])

    @classmethod
    def load(cls, name: str = "download", device: str = "cpu") -> ClipColours:
        """`name`: `download`, or a folder of transformers. Raises UserError: no such model, no QuickGELU."""
        name = MODEL if name == "download" else name
        with hub.described(f"colour model '{name}'"):
            model = hub.from_pretrained(CLIPModel, name, dtype=torch.float32)
            tokenizer = hub.from_pretrained(AutoTokenizer, name)
        return cls(model, tokenizer, device, name)

    @torch.no_grad()
    def __call__(self, image: Tensor, objects: Sequence[FoundObject]) -> list[str]:
        """One of COLOURS for each object; all objects have one name."""
        if not objects:
            return []
        x = torch.stack([self._prepared(masked_crop(image, one)) for one in objects]).to(self._device)
        pooled = self._model.vision_model(pixel_values=x).pooler_output
        vectors = F.normalize(self._model.visual_projection(pooled), dim=1)
        best = (vectors @ self._of(objects[0].name).T).argmax(dim=1)
        return [COLOURS[index] for index in best.tolist()]

    def _of(self, name: str) -> Tensor:
        """Unit vectors of every colour of an object, [C, D]."""
        if name not in self._directions:
            sentences = [t.format(colour=colour, name=name) for colour in COLOURS for t in TEMPLATES]
            ids = self._tokenizer(sentences, padding=True, return_tensors="pt")
            inputs = {key: ids[key].to(self._device) for key in ("input_ids", "attention_mask")}
            pooled = self._model.text_model(**inputs).pooler_output
            vectors = F.normalize(self._model.text_projection(pooled), dim=1)
            self._directions[name] = F.normalize(
                vectors.reshape(len(COLOURS), len(TEMPLATES), -1).mean(dim=1), dim=1
            )
        return self._directions[name]

    def _prepared(self, crop: Image.Image) -> Tensor:
        """The crop as CLIP's input, float32 [3, S, S]."""
        picture = transforms.resize(crop, self._input_px, transforms.InterpolationMode.BICUBIC)
        picture = transforms.center_crop(picture, self._input_px)
        pixels_01 = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (pixels_01 - mean) / std


def masked_crop(image: Tensor, found: FoundObject) -> Image.Image:
    """The object alone, on grey, cut to its box. `image`: uint8 [3, H, W]."""
    grey = torch.tensor(GREY, dtype=torch.uint8)[:, None, None]
    painted = torch.where(found.mask, image, grey)
    x0, y0, x1, y1 = (round(side) for side in found.box)
    return Image.fromarray(painted[:, y0:y1, x0:x1].permute(1, 2, 0).contiguous().numpy())
