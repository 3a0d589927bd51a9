"""LPIPS as a score (Zhang et al. 2018): v0.1 on VGG16, the network of the training loss.

Shapes: B images, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokenizer.training.perceptual import LpipsVgg16
from tokenizer.weights import state_hash

REMEDY = "give torchvision's .pth as --vgg16 FILE, or leave LPIPS out with --vgg16 none"


class Lpips:
    """Distance of 8-bit images, scaled to [-1, 1] for the network. `fingerprint` hashes VGG16 and the heads."""

    def __init__(self, network: LpipsVgg16, device: str = "cpu") -> None:
        self._device = torch.device(device)
        self._network = network.to(self._device)
        self.fingerprint = state_hash(network)

    @classmethod
    def load(cls, vgg16_weights: str = "download", device: str = "cpu") -> Lpips:
        """`vgg16_weights`: `download`, or a path of torchvision's .pth. Raises UserError: cannot be read."""
        network = LpipsVgg16()
        network.load_vgg16(vgg16_weights, REMEDY)
        return cls(network, device)

    @torch.no_grad()
    def __call__(self, image: Tensor, reference: Tensor) -> Tensor:
        """Distance of each image from its reference, float32 [B]; both uint8 [B, 3, H, W]."""
        assert image.dtype == reference.dtype == torch.uint8, "the protocol is defined on 8-bit images"
        assert image.shape == reference.shape and image.ndim == 4
        image_01, reference_01 = (x.to(self._device).float() / 255 for x in (image, reference))
        distance: Tensor = self._network(image_01, self._network.reference(reference_01))
        return distance.cpu()
