"""The network of the emoji judge: a small fully convolutional classifier that answers once per grid cell.

Shapes: B images, K object classes, Q background classes, Y X cells of the grid (8 px each), C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from base.config import ConfigError, UserError
from quickstart.config import NORM_GROUPS, JudgeConfig
from tokenizer.norms import GroupNorm

CELL_PX = 8
CORE = 0.18  # half side of an object's core, as a share of its box side


@dataclass(frozen=True)
class SceneClasses:
    """The classes that a scene can hold; written beside the judge's weights."""

    objects: tuple[str, ...]
    backgrounds: tuple[str, ...]

    def __post_init__(self) -> None:
        for names in (self.objects, self.backgrounds):
            if not names or len(set(names)) != len(names):
                raise ConfigError("objects and backgrounds must be distinct names, at least one each")


class JudgeNetwork(nn.Module):
    """Pixels -> for every cell its object (or none), and for the whole image its background.

    The norms are group norms: batch norms have running statistics that would differ between ranks and lag behind
    averaged weights.
    """

    def __init__(self, config: JudgeConfig, classes: SceneClasses) -> None:
        super().__init__()
        first, second, last = config.channels
        self.trunk = nn.Sequential(
            _Conv(3, first, stride=2),
            _Conv(first, second, stride=2),
            _Conv(second, second),
            _Conv(second, last, stride=2),
            _Residual(last),
        )
        self.norm = GroupNorm(NORM_GROUPS, last)
        self.object_head = nn.Conv2d(last, len(classes.objects) + 1, 1)
        self.background_head = nn.Linear(last, len(classes.backgrounds))

    def forward(self, pixels_01: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, 3, H, W] in [0, 1] -> logits [B, K+1, Y, X] (class K: no object here) and [B, Q]."""
        pixels = ((pixels_01 - 0.5) * 4).contiguous(memory_format=torch.channels_last)
        features = F.relu(self.norm(self.trunk(pixels)))
        return self.object_head(features), self.background_head(features.mean((2, 3)))


def object_evidence(cell_logits: Tensor) -> tuple[Tensor, Tensor]:
    """The cell where each object is most probable: [B, K+1, Y, X] -> probabilities float32 [B, K], cells int64 [B, K].

    A cell is numbered y * X + x. Its probability counts as the probability that the object is in the image at all.
    """
    probabilities, cells = cell_logits.float().softmax(1)[:, :-1].flatten(2).max(2)
    return probabilities, cells


def cell_targets(objects: Sequence[tuple[int, Sequence[float]]], size_px: int, none: int) -> Tensor:
    """The target of each cell, int64 [Y, X].

    `objects`: (class, box x0 y0 x1 y1 in pixels). A cell in an object's core has the object's class k. A cell elsewhere
    in its box may say k or none, and has the target -1 - k. Every other cell is `none`.
    """
    centres = torch.arange(CELL_PX / 2, size_px, CELL_PX)
    targets = torch.full((len(centres), len(centres)), none)
    marks = []
    for kind, (x0, y0, x1, y1) in objects:
        offset_x, offset_y = (centres - (x0 + x1) / 2).abs(), (centres - (y0 + y1) / 2).abs()
        half_x, half_y = (x1 - x0) / 2, (y1 - y0) / 2
        # At least half a cell, so that every object has a core.
        core_x, core_y = max(2 * CORE * half_x, CELL_PX / 2), max(2 * CORE * half_y, CELL_PX / 2)
        marks.append((-1 - kind, (offset_y < half_y)[:, None] & (offset_x < half_x)))
        marks.append((kind, (offset_y <= core_y)[:, None] & (offset_x <= core_x)))
    for value, cells in sorted(marks, key=lambda mark: mark[0]):  # cores last, over the boxes
        targets[cells] = value
    return targets


def cell_loss(cell_logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each image, float32 [B]: means over core, border and empty cells, added.

    On the border the loss is -log(p_k + p_none). `cell_logits` [B, K+1, Y, X], `targets` [B, Y, X].
    """
    none = cell_logits.shape[1] - 1
    log_p = cell_logits.float().log_softmax(1)
    border = targets < 0
    kind = torch.where(border, -1 - targets, targets)
    right = log_p.gather(1, kind[:, None])[:, 0]
    right = torch.where(border, torch.logaddexp(right, log_p[:, none]), right)
    loss = torch.zeros(len(targets), device=targets.device)
    for cells in ((targets >= 0) & (targets < none), border, targets == none):
        loss = loss - (right * cells).sum((1, 2)) / cells.sum((1, 2)).clamp(min=1)
    return loss


def scene_targets(
    scenes: Sequence[Mapping[str, Any]], classes: SceneClasses, size_px: int
) -> tuple[Tensor, Tensor]:
    """Labels of scenes {"objects": [{"name", "box"}, ...], "background": name}.

    Returns cells int64 [B, Y, X] and backgrounds int64 [B]. Raises UserError naming an unknown class.
    """
    kinds = {name: index for index, name in enumerate(classes.objects)}
    colours = {name: index for index, name in enumerate(classes.backgrounds)}
    try:
        cells = [
            cell_targets(
                [(kinds[thing["name"]], thing["box"]) for thing in scene["objects"]], size_px, len(kinds)
            )
            for scene in scenes
        ]
        backgrounds = [colours[scene["background"]] for scene in scenes]
    except KeyError as error:
        raise UserError(f"judge: a scene lacks or has unknown {error}; make the shards again") from None
    return torch.stack(cells), torch.tensor(backgrounds)


class _Conv(nn.Sequential):
    """3x3 convolution, norm, ReLU."""

    def __init__(self, num_in: int, num_out: int, stride: int = 1) -> None:
        super().__init__(
            nn.Conv2d(num_in, num_out, 3, stride, padding=1, bias=False),
            GroupNorm(NORM_GROUPS, num_out),
            nn.ReLU(),
        )


class _Residual(nn.Module):
    """x + conv(conv-norm-relu(x))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _Conv(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return x + y
