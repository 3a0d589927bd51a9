"""DINOv2 for FD-DINOv2 and CLIP for CMMD, from transformers.

FD-DINOv2 (Stein et al. 2023): class token of DINOv2 ViT-L/14 after the last LayerNorm, 224 px. CMMD (Jayasumana et
al. 2024): image embedding of CLIP ViT-L/14 at 336 px. Both resize the whole image, bicubic with antialiasing on 8
bits, as Pillow does.

One thing could not be checked without a network: that the published weights give the published numbers.

Shapes: B images, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionModelWithProjection

from base import files, hub
from base.config import UserError
from tokenizer.weights import freeze, state_hash

Kind = Literal["dinov2", "clip"]
NAMES: Mapping[Kind, str] = {"dinov2": "facebook/dinov2-large", "clip": "openai/clip-vit-large-patch14-336"}
INPUT_PX: Mapping[Kind, int] = {"dinov2": 224, "clip": 336}
STATISTICS: Mapping[Kind, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "dinov2": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


class VisionFeatures:
    """One vector from a transformers vision model; implements evaluation.features.interface.FeatureExtractor."""

    def __init__(
        self, kind: Kind, model: nn.Module, input_px: int, device: str = "cpu", source: str = "given"
    ) -> None:
        """`source`: where the weights come from, for the record."""
        self.name = kind
        self._device = torch.device(device)
        self._model = model.to(self._device)
        freeze(self._model)
        self._input_px = input_px
        self._mean, self._std = (torch.tensor(x)[:, None, None] for x in STATISTICS[kind])
        prepared = {
            "vector": "class token after the last LayerNorm" if kind == "dinov2" else "image embedding",
            "input": f"whole image to {input_px} px, Pillow bicubic on 8 bits",
        }
        self.protocol: Mapping[str, Any] = {"network": source, **prepared}
        self.fingerprint = files.digest([kind, prepared, state_hash(model)])
        self.dim = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]

    @classmethod
    def load(cls, kind: Kind, name: str = "download", device: str = "cpu") -> VisionFeatures:
        """`name`: `download`, or a folder of transformers. Raises UserError: no such model, another input."""
        name = NAMES[kind] if name == "download" else name
        library = AutoModel if kind == "dinov2" else CLIPVisionModelWithProjection
        with hub.described(f"network '{name}'"):
            model = hub.from_pretrained(library, name, dtype=torch.float32)
        if kind == "clip" and model.config.image_size != INPUT_PX[kind]:
            raise UserError(
                f"{name}: its input is {model.config.image_size} px; CMMD is defined on CLIP at {INPUT_PX[kind]} px"
            )
        return cls(kind, model, INPUT_PX[kind], device, name)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D]."""
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4
        x = torch.stack([self._prepared(image) for image in pixels]).to(self._device)
        output = self._model(pixel_values=x)
        vector: Tensor = output.last_hidden_state[:, 0] if self.name == "dinov2" else output.image_embeds
        return vector.float().cpu()

    def _prepared(self, image: Tensor) -> Tensor:
        """uint8 [3, H, W] -> normalised float32 [3, S, S]."""
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        picture = picture.resize((self._input_px, self._input_px), Image.Resampling.BICUBIC)
        pixels_01 = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        return (pixels_01 - self._mean) / self._std
