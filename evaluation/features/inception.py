"""FID's InceptionV3 in torch: the network of 2015-12-05 behind every published FID.

It is torchvision's InceptionV3 with torch-fidelity's pooling branches: averages leave out the padding, and the last
block takes a maximum. torch-fidelity's own network would run what a weights file holds (`torch.load` without
`weights_only`), so only its blocks and its resize are used. Input: TF1's resize to 299, (x - 128) / 128; output: pool3,
2048 values. ADM's protocol also reads the first 7 channels of a 17 x 17 layer (sFID) and the classifier of 1008 classes
(inception score).

Two things could not be checked without a network: that the published weights give the published numbers (a faithful
port has FID 3.9410 where TensorFlow has 3.9426 on ADM's samples), and the file itself. Checked with random
weights: names and shapes, wiring against torchvision's, resize against a scalar loop.

Shapes: B images, H W pixels, D = 2048 features, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import InceptionA, InceptionC, InceptionE_1, InceptionE_2
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x
from torchvision.models import inception

from base import files
from base.config import UserError
from evaluation.downloads import fetch
from tokenizer.releases.checkpoint import read_checkpoint
from tokenizer.weights import freeze, load_exact, state_hash

WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
    "pt_inception-2015-12-05-6726825d.pth"
)
WEIGHTS_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INPUT_PX = 299
NUM_FEATURES = 2048
HEAD = ("fc.weight", "fc.bias")  # the classifier in the file; ADM uses its weight alone
SPATIAL_LAYER = "Mixed_6d.branch1x1"
NUM_SPATIAL_CHANNELS = 7  # in the seventh mixed block's first branch, TensorFlow's "mixed_6/conv"
COUNTER = ".num_batches_tracked"  # a buffer of batch norms without effect, absent from older files


class InceptionFeatures:
    """pool3 of FID's InceptionV3; implements evaluation.features.interface.FeatureExtractor."""

    name = "inception"
    dim = NUM_FEATURES

    def __init__(self, network: nn.Module, device: str = "cpu", weights: str = "given") -> None:
        """`weights`: where the weights come from, for the record."""
        self._device = torch.device(device)
        self._network = network.to(self._device)
        freeze(self._network)
        self.fingerprint = state_hash(network)
        self.protocol: Mapping[str, Any] = {
            "network": "InceptionV3 of FID, pool3 (2048)",
            "weights": weights,
            "input": f"TF1 bilinear resize to {INPUT_PX}, no antialiasing, (x - 128) / 128, fp32",
        }

    @classmethod
    def load(cls, weights: str = "download", device: str = "cpu") -> InceptionFeatures:
        """`weights`: `download`, or the path of the .pth file. Raises UserError: no such file, other weights."""
        path = _weights_path(weights)
        return cls(fid_inception(read_checkpoint(path).tensors, str(path)), device, _source(path))

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, 2048]."""
        assert pixels.dtype == torch.uint8 and pixels.ndim == 4
        x = (resize_tf1(pixels.to(self._device), INPUT_PX) - 128) / 128
        features: Tensor = self._network(x)
        return features.float().cpu()


class AdmInception:
    """pool3 and the spatial features of sFID in one vector; implements FeatureExtractor.

    The spatial features are NUM_SPATIAL_CHANNELS channels of `spatial_layer`'s output, in ADM's order (y, x, channel).
    """

    name = "inception"

    def __init__(
        self,
        network: nn.Module,
        spatial_layer: nn.Module,
        classifier: Tensor,
        device: str = "cpu",
        weights: str = "given",
    ) -> None:
        """`classifier`: the inception score's, [K, D]; `weights`: where the weights come from, for the record."""
        self._pool = InceptionFeatures(network, device, weights)
        self._seen: list[Tensor] = []
        spatial_layer.register_forward_hook(lambda _, __, output: self._seen.append(output))
        self.classifier = classifier.float().cpu()
        self.pool_dim = classifier.shape[1]
        self.dim = self(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)).shape[1]
        head = hashlib.sha256(self.classifier.contiguous().numpy().tobytes()).hexdigest()
        self.fingerprint = files.digest([self._pool.fingerprint, head])
        self.protocol: Mapping[str, Any] = {
            **self._pool.protocol,
            "network": "InceptionV3 of FID: pool3, and 7 channels of mixed_6/conv for sFID",
            "classifier": "softmax of pool3 times the weight, no bias",
        }

    @classmethod
    def load(cls, weights: str = "download", device: str = "cpu") -> AdmInception:
        """Loads the weights as InceptionFeatures.load does."""
        path = _weights_path(weights)
        tensors = read_checkpoint(path).tensors
        network = fid_inception(tensors, str(path))
        if HEAD[0] not in tensors:
            raise UserError(
                f"{path}: has no {HEAD[0]}, which the inception score needs; give the published file"
            )
        return cls(network, network.get_submodule(SPATIAL_LAYER), tensors[HEAD[0]], device, _source(path))

    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float32 [B, D + S]."""
        self._seen.clear()
        pool = self._pool(pixels)
        (spatial,) = self._seen
        self._seen.clear()
        spatial = spatial[:, :NUM_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return torch.cat([pool, spatial.float().cpu()], dim=1)


def resize_tf1(pixels_BCHW: Tensor, size_px: int) -> Tensor:
    """TensorFlow 1's bilinear resize: uint8 [B, C, H, W] -> float32 [B, C, S, S]; values keep their range.

    Output pixel i is taken at i * in / out: no half-pixel centres, no antialiasing. Any other resize moves FID (Parmar
    et al. 2022).
    """
    size = (size_px, size_px)
    resized: Tensor = interpolate_bilinear_2d_like_tensorflow1x(
        pixels_BCHW.float(), size, align_corners=False
    )
    return resized


def _weights_path(weights: str) -> Path:
    if weights == "download":
        return fetch(WEIGHTS_URL, WEIGHTS_SHA256, "give the path of that file instead")
    return Path(weights)


def _source(path: Path) -> str:
    return "pt_inception-2015-12-05" if files.sha256(path) == WEIGHTS_SHA256 else "not the published file"


def fid_inception(tensors: Mapping[str, Tensor], where: str) -> nn.Module:
    """Builds the network with the file's weights: [B, 3, 299, 299] -> [B, 2048].

    Raises UserError unless every tensor but the classifier's two has a parameter, and every parameter a tensor.
    """
    with torch.device("meta"):  # initial weights would cost seconds and random numbers
        network = inception.Inception3(
            aux_logits=False,
            init_weights=False,
            inception_blocks=[
                inception.BasicConv2d,
                InceptionA,
                inception.InceptionB,
                InceptionC,
                inception.InceptionD,
                InceptionE_1,
                inception.InceptionAux,
            ],
        )
        network.Mixed_7c = InceptionE_2(2048)
        network.fc = nn.Identity()
    network = network.to_empty(device="cpu")
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(COUNTER)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in HEAD}
    load_exact(network, {**counters, **kept}, where)
    return network  # type: ignore[no-any-return]
