"""FID's InceptionV3 in torch: the network of 2015-12-05 behind every published FID.

It is torchvision's InceptionV3 except for the pooling branches: averages leave out the padding, and the last
block takes a maximum. Input: TF1's resize to 299, (x - 128) / 128; output: pool3, 2048 values. ADM's protocol also
reads the first 7 channels of a 17 x 17 layer (sFID) and the classifier of 1008 classes (inception score).

Two things could not be checked without a network: that the published weights give the published numbers (a faithful
port has FID 3.9410 where TensorFlow has 3.9426 on ADM's samples), and the file itself. Checked with random
weights: names and shapes, wiring against torchvision's, resize against a scalar loop.

Shapes: B images, H W pixels, D = 2048 features, C channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import inception

from base import files
from base.config import UserError
from evaluation.downloads import fetch
from evaluation.features.tf1_resize import resize_tf1
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

Pool = Callable[[Tensor], Tensor]


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
                _BlockA,
                inception.InceptionB,
                _BlockC,
                inception.InceptionD,
                _BlockE,
                inception.InceptionAux,
            ],
        )
        network.Mixed_7c = _BlockE(2048, pool=_maximum)
        network.fc = nn.Identity()
    network = network.to_empty(device="cpu")
    counters = {name: torch.tensor(0) for name in network.state_dict() if name.endswith(COUNTER)}
    kept = {name: tensor for name, tensor in tensors.items() if name not in HEAD}
    load_exact(network, {**counters, **kept}, where)
    return network  # type: ignore[no-any-return]


def _average(x_BCHW: Tensor) -> Tensor:
    """3 x 3 mean over existing pixels; torchvision's blocks also count the zeros of the padding."""
    return F.avg_pool2d(x_BCHW, 3, stride=1, padding=1, count_include_pad=False)


def _maximum(x_BCHW: Tensor) -> Tensor:
    """3 x 3 maximum: the pool of the last block."""
    return F.max_pool2d(x_BCHW, 3, stride=1, padding=1)


class _BlockA(inception.InceptionA):  # type: ignore[misc]
    """A block at 35 x 35 cells."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        five = self.branch5x5_2(self.branch5x5_1(x))
        return [self.branch1x1(x), five, double, self.branch_pool(_average(x))]


class _BlockC(inception.InceptionC):  # type: ignore[misc]
    """A block at 17 x 17 cells."""

    def _forward(self, x: Tensor) -> list[Tensor]:
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), seven, double, self.branch_pool(_average(x))]


class _BlockE(inception.InceptionE):  # type: ignore[misc]
    """A block at 8 x 8 cells; `pool` differs between the first and the second of the two blocks."""

    def __init__(self, in_channels: int, pool: Pool = _average) -> None:
        super().__init__(in_channels)
        self._pool = pool

    def _forward(self, x: Tensor) -> list[Tensor]:
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return [
            self.branch1x1(x),
            self.branch3x3_2a(three),
            self.branch3x3_2b(three),
            self.branch3x3dbl_3a(double),
            self.branch3x3dbl_3b(double),
            self.branch_pool(self._pool(x)),
        ]
