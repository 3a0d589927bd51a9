"""Drawing latents of classes: a solver along the guided velocity.

Shape suffixes: B images of one batch, C latent channels, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from data.packs.transfer import to_device
from generator.class_conditional.config import ClassSamplingConfig
from generator.class_conditional.model import ClassGenerator
from generator.cuda_graphs import Graphed
from generator.flow import draw_noise, resolve_shift, sampling_times
from generator.guidance import is_guided
from generator.model import unnormalise
from generator.solvers import integrate


class GuidedClassVelocity:
    """The velocity of one batch under guidance: a `Velocity` of generator/solvers.py."""

    def __init__(
        self,
        model: ClassGenerator,
        labels_B: Tensor,
        config: ClassSamplingConfig,
        guide: ClassGenerator | None = None,
    ) -> None:
        self._config = config
        none_B = torch.full_like(labels_B, model.config.num_classes)
        weak, weak_labels_B = (model, none_B) if guide is None else (guide, labels_B)
        self._plain = Graphed(partial(_velocity, model, labels_B), [model])
        self._guided = Graphed(
            partial(_guided, model, labels_B, weak, weak_labels_B, config.guidance), [model, weak]
        )

    def __call__(self, x_BCYX: Tensor, t: float) -> Tensor:
        """[B, C, Y, X] -> [B, C, Y, X]."""
        is_plain = self._config.guidance == 1 or not is_guided(t, self._config.guidance_interval)
        velocity = self._plain if is_plain else self._guided
        return velocity(x_BCYX, torch.full((), t, device=x_BCYX.device))


def _velocity(model: ClassGenerator, labels_B: Tensor, x_BCYX: Tensor, t: Tensor) -> Tensor:
    """The model's velocity at time `t`, an fp32 scalar."""
    v_BCYX: Tensor = model(x_BCYX, t.expand(len(x_BCYX)), labels_B)
    return v_BCYX


def _guided(
    model: ClassGenerator,
    labels_B: Tensor,
    weak: ClassGenerator,
    weak_labels_B: Tensor,
    scale: float,
    x_BCYX: Tensor,
    t: Tensor,
) -> Tensor:
    v_BCYX = _velocity(model, labels_B, x_BCYX, t)
    weak_BCYX = _velocity(weak, weak_labels_B, x_BCYX, t)
    return weak_BCYX + scale * (v_BCYX - weak_BCYX)


@torch.no_grad()
def sample_class_latents(
    model: ClassGenerator,
    labels: Sequence[int],
    seeds: Sequence[int],
    config: ClassSamplingConfig,
    guide: ClassGenerator | None = None,
) -> Tensor:
    """Draws one image for each label: float32 [N, C, Y, X] on the CPU, un-normalised, as a decoder takes it.

    Noise comes from each image's own seed, so up to rounding an image does not depend on the others of its batch.
    `guide`: AutoGuidance's weaker model; None: `model` without the class.
    """
    assert len(labels) == len(seeds) > 0
    shape = model.latents.shape
    device = model.pos_embed.device
    times = sampling_times(config.num_steps, resolve_shift(config.time_shift, shape))
    latents = []
    for start in range(0, len(labels), config.batch_images):
        part = slice(start, start + config.batch_images)
        labels_B, noise_BCYX = to_device((torch.tensor(labels[part]), draw_noise(shape, seeds[part])), device)
        velocity = GuidedClassVelocity(model, labels_B, config, guide)
        x_BCYX = integrate(velocity, noise_BCYX, times, config.solver)
        latents.append(x_BCYX.cpu())
    return unnormalise(torch.cat(latents), model.latents)
