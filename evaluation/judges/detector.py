"""Object detection for GenEval: Mask2Former of transformers, with mmdetection's pre- and post-processing.

GenEval's detector is mmdetection's Mask2Former Swin-S; `facebook/mask2former-swin-small-coco-instance` is the same
architecture (COCO AP 46.3, theirs 46.1). mmdetection's steps around the network decide scores, so they are done here:
short side to 800 px (long side at most 1333), padding to multiples of 32; of all queries and classes the 100 most
certain pairs; score = class probability times the mean probability of the mask where it is above one half; box = the
mask's extent.

Shapes: H W pixels of the image, Q queries, K classes, n pairs that are kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Mask2FormerForUniversalSegmentation

from base import files, hub
from base.config import UserError
from tokenizer.weights import freeze, state_hash

MODEL = "facebook/mask2former-swin-small-coco-instance"
SHORT_PX, LONG_PX, MULTIPLE_PX = 800, 1333, 32
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
MAX_DETECTIONS = 100
CLASSES = (
    "person bicycle car motorcycle airplane bus train truck boat traffic_light fire_hydrant stop_sign "
    "parking_meter bench bird cat dog horse sheep cow elephant bear zebra giraffe backpack umbrella handbag tie "
    "suitcase frisbee skis snowboard sports_ball kite baseball_bat baseball_glove skateboard surfboard "
    "tennis_racket bottle wine_glass cup fork knife spoon bowl banana apple sandwich orange broccoli carrot hot_dog "
    "pizza donut cake chair couch potted_plant bed dining_table toilet tv laptop computer_mouse tv_remote "
    "computer_keyboard cell_phone microwave oven toaster sink refrigerator book clock vase scissors teddy_bear "
    "hair_drier toothbrush"
)
NAMES = tuple(name.replace("_", " ") for name in CLASSES.split())
"""COCO's 80 classes by index, as GenEval's prompts call them."""


@dataclass(frozen=True)
class FoundObject:
    """One detection with its mask."""

    name: str
    score: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1 (x1, y1 outside), pixels
    mask: Tensor  # bool [H, W]


class Detector(Protocol):
    """Finds objects of COCO's classes."""

    @property
    def fingerprint(self) -> str:
        """Hash of weights and preparation."""

    @property
    def protocol(self) -> Mapping[str, Any]:
        """The choices that decide the detections, in words, as JSON values."""

    def __call__(self, image: Tensor) -> list[FoundObject]:
        """uint8 [3, H, W] -> every detection, however uncertain."""


class Mask2FormerDetector:
    """Mask2Former as a Detector."""

    def __init__(self, model: nn.Module, device: str = "cpu", source: str = "given") -> None:
        """Raises UserError: a model whose classes are not COCO's."""
        config: Any = model.config
        if config.num_labels != len(NAMES):
            raise UserError(
                f"{source}: a detector of {config.num_labels} classes; GenEval needs COCO's {len(NAMES)}"
            )
        self._device = torch.device(device)
        self._model = model.to(self._device)
        freeze(self._model)
        self.protocol: Mapping[str, Any] = {
            "network": source,
            "input": f"short side {SHORT_PX}, long side at most {LONG_PX}, bilinear, padded to {MULTIPLE_PX}",
            "score": "class probability times mean mask probability above 0.5, 100 surest (mmdetection)",
        }
        self.fingerprint = files.digest([state_hash(model), dict(self.protocol)])

    @classmethod
    def load(cls, name: str = "download", device: str = "cpu") -> Mask2FormerDetector:
        """`name`: `download`, or a folder of transformers. Raises UserError: no such model, other classes."""
        name = MODEL if name == "download" else name
        with hub.described(f"detector '{name}'"):
            model = hub.from_pretrained(Mask2FormerForUniversalSegmentation, name, dtype=torch.float32)
        return cls(model, device, name)

    @torch.no_grad()
    def __call__(self, image: Tensor) -> list[FoundObject]:
        """uint8 [3, H, W] -> at most MAX_DETECTIONS objects, the most certain first."""
        assert image.dtype == torch.uint8 and image.ndim == 3
        x, (height, width) = prepare(image.to(self._device))
        output = self._model(pixel_values=x)
        return post_process(
            output.class_queries_logits[0].float(),
            output.masks_queries_logits[0].float(),
            padded=(x.shape[2], x.shape[3]),
            inside=(height, width),
            original=(image.shape[1], image.shape[2]),
        )


def prepare(image: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """uint8 [3, H, W] -> float32 [1, 3, padded H, padded W], and the size inside the padding."""
    height, width = image.shape[1:]
    scale = min(LONG_PX / max(height, width), SHORT_PX / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    x = F.interpolate(image[None].float(), size=size, mode="bilinear", align_corners=False)
    x = x.round()  # the original resizes 8-bit images
    mean, std = (torch.tensor(values, device=x.device)[None, :, None, None] for values in (MEAN, STD))
    x = (x - mean) / std
    right, bottom = (-side % MULTIPLE_PX for side in (size[1], size[0]))
    return F.pad(x, (0, right, 0, bottom)), size


def post_process(
    class_logits: Tensor,
    mask_logits: Tensor,
    *,
    padded: tuple[int, int],
    inside: tuple[int, int],
    original: tuple[int, int],
) -> list[FoundObject]:
    """float32 [Q, K + 1] (last: no object) and [Q, h, w] -> at most MAX_DETECTIONS objects, the most certain first.

    Sizes are (height, width): `padded` of the padded input, `inside` of the image in it, `original` of the given image.
    """
    scores = class_logits.softmax(dim=-1)[:, :-1]
    num_classes = scores.shape[1]
    top_scores, places = scores.flatten().topk(min(MAX_DETECTIONS, scores.numel()))
    queries, classes = places // num_classes, places % num_classes
    used, which = torch.unique(queries, return_inverse=True)
    masks = F.interpolate(mask_logits[used][None], size=padded, mode="bilinear", align_corners=False)
    masks = masks[:, :, : inside[0], : inside[1]]
    masks = F.interpolate(masks, size=original, mode="bilinear", align_corners=False)[0]
    binary = masks > 0
    area = binary.flatten(1).sum(1)
    sureness = (masks.sigmoid() * binary).flatten(1).sum(1) / (area + 1e-6)
    total = (top_scores * sureness[which]).tolist()
    on_cpu = binary.cpu()
    boxes = [_box(mask) for mask in on_cpu]
    return [
        FoundObject(NAMES[class_index], score, boxes[mask_index], on_cpu[mask_index])
        for class_index, score, mask_index in zip(classes.tolist(), total, which.tolist(), strict=True)
    ]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """Extent of a bool [H, W]; zeros for an empty one."""
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
