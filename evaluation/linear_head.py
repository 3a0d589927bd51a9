"""DINOv2's published linear head on a tokenizer's encoder: how much of DINOv2 is left (paper: 84.56 -> 84.18).

Protocol of the head (DINOv2, one layer): short side to 256 px (bicubic), centre crop 224, class token and mean
patch token after the last LayerNorm, side by side, one Linear to ImageNet's 1000 classes. RPiAE removes that
LayerNorm's affine. The head was trained with it, so the pretrained model's weight and bias are put back.

Two things could not be checked without a network: the two downloads, and that the untouched ViT-B with registers
gives about 84.4. Check that number first; another number means that something here is wrong.

Shapes: B images, D width, S = 224 input px, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import functional as transforms

from base import hub
from base.config import ConfigError, UserError
from evaluation.config import Head
from evaluation.downloads import fetch
from evaluation.features.representation import last_tokens
from evaluation.suites.linear_probe import ranked
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.representation import Representation
from tokenizer.weights import freeze, state_hash

RESIZE_PX = 256
CROP_PX = 224
NUM_CLASSES = 1000
URL = "https://dl.fbaipublicfiles.com/dinov2/{model}/{model}{registers}_linear_head.pth"
SIZES = {"vits14": "small", "vitb14": "base", "vitl14": "large", "vitg14": "giant"}


def _published(name: str) -> tuple[str, str]:
    """The address of a published head, and timm's name of the model it was trained on."""
    model, registers = name.removesuffix("_reg4"), "_reg4" if name.endswith("_reg4") else ""
    word = SIZES[model.removeprefix("dinov2_")]
    return URL.format(model=model, registers=registers), f"vit_{word}_patch14{registers}_dinov2.lvd142m"


HEADS = {name: _published(name) for name in get_args(Head)}
NORM_NAMES = ("norm", "layernorm")  # the last LayerNorm in timm's and DINOv2's files, and in transformers'


class LinearHead(nn.Module):
    """A published head, and the affine of the LayerNorm that the head was trained with; fp32."""

    norm_weight: Tensor  # [D]
    norm_bias: Tensor  # [D]
    weight: Tensor  # [K, 2 D]: for the class token, then for the mean patch token
    bias: Tensor  # [K]

    def __init__(self, norm_weight: Tensor, norm_bias: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        width = len(norm_weight)
        if weight.shape != (NUM_CLASSES, 2 * width) or bias.shape != (NUM_CLASSES,):
            raise UserError(
                f"linear head: weight {list(weight.shape)} and bias {list(bias.shape)}; the one-layer head of a "
                f"model of width {width} has [{NUM_CLASSES}, {2 * width}] and [{NUM_CLASSES}]"
            )
        self.register_buffer("norm_weight", norm_weight.float())
        self.register_buffer("norm_bias", norm_bias.float())
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    @classmethod
    def load(cls, name: str, head: str = "download", model: str = "download") -> LinearHead:
        """`name`: a key of HEADS. `head`, `model`: `download`, or the path of the head's .pth and of the
        pretrained model's .safetensors or .pth. Raises UserError: no such file, or weights that do not fit."""
        if name not in HEADS:
            raise ConfigError(f"no published linear head '{name}'; there are {', '.join(HEADS)}")
        url, timm_name = HEADS[name]
        path = fetch(url, None, "give the path of that file instead") if head == "download" else Path(head)
        linear = read_checkpoint(path).tensors
        if set(linear) != {"weight", "bias"}:
            raise UserError(f"{path}: no linear head (weight and bias); give the file of one layer")
        norm_weight, norm_bias = _pretrained_norm(timm_name) if model == "download" else _read_norm(model)
        return cls(norm_weight, norm_bias, linear["weight"], linear["bias"])

    def forward(self, class_token: Tensor, patches: Tensor) -> Tensor:
        """[B, D] and [B, N, D] after the LayerNorm *without* affine -> logits [B, K]."""
        class_token, patches = (x * self.norm_weight + self.norm_bias for x in (class_token, patches))
        return F.linear(torch.cat([class_token, patches.mean(dim=1)], dim=1), self.weight, self.bias)


class HeadClassifier:
    """The classes that a head sees in images; implements evaluation.suites.linear_probe.Classifier."""

    def __init__(self, representation: Representation, head: LinearHead, device: str = "cpu") -> None:
        """Raises ConfigError: the encoder's width or input differs from the head's."""
        if representation.width != len(head.norm_weight):
            raise ConfigError(
                f"the linear head is for width {len(head.norm_weight)}, the encoder has {representation.width}; "
                "take the head of the same size"
            )
        if representation.config.input_px != CROP_PX:
            raise ConfigError(f"the linear head's protocol is {CROP_PX} px; set input_px to that")
        self._device = torch.device(device)
        self._representation = representation.to(self._device)
        freeze(self._representation)
        self._head = head.to(self._device)
        self.num_classes = len(head.bias)
        self.fingerprints = {"encoder": state_hash(representation), "head": state_hash(head)}
        self.protocol: Mapping[str, Any] = {
            "input": f"short side {RESIZE_PX} (bicubic), centre crop {CROP_PX}",
            "input mean": list(representation.mean),
            "input std": list(representation.std),
            "features": "class token and mean patch token after the last LayerNorm, affine restored",
            "head": "DINOv2's published linear head, one layer",
        }

    @torch.no_grad()
    def __call__(self, images: Sequence[Tensor]) -> Tensor:
        """uint8 [3, H, W] of any sizes -> int64 [B, R]."""
        pixels = torch.stack([prepare(image) for image in images]).to(self._device)
        class_token, patches = last_tokens(self._representation, pixels.float() / 255)
        logits: Tensor = self._head(class_token, patches)
        return ranked(logits).cpu()


def prepare(image: Tensor) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, 224, 224]: DINOv2's evaluation transform, by torchvision as in DINOv2."""
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    picture = transforms.resize(picture, RESIZE_PX, transforms.InterpolationMode.BICUBIC)
    picture = transforms.center_crop(picture, CROP_PX)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def _read_norm(path: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of the last LayerNorm in a file of the pretrained model."""
    tensors = read_checkpoint(path).tensors
    for name in NORM_NAMES:
        if f"{name}.weight" in tensors and f"{name}.bias" in tensors:
            return tensors[f"{name}.weight"], tensors[f"{name}.bias"]
    raise UserError(f"{path}: has no norm.weight and norm.bias; give the pretrained model with its last norm")


def _pretrained_norm(timm_name: str) -> tuple[Tensor, Tensor]:
    try:
        norm: nn.LayerNorm = hub.create_timm(timm_name, pretrained=True, num_classes=0).norm
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"weights of '{timm_name}' cannot be downloaded ({reason}); give the path of the model's file"
        ) from None
    return norm.weight.detach(), norm.bias.detach()
