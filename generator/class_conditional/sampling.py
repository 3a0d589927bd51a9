"""Drawing latents of classes: a solver along the guided velocity.

Shape suffixes: B images of one batch, C latent channels, Y X latent grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from generator.class_conditional.model import ClassGenerator
from generator.drawing import DrawingConfig, check_interval, check_scale, draw_noise, is_guided
from generator.flow import resolve_shift, sampling_times
from generator.model import unnormalise
from generator.solvers import integrate


@dataclass(frozen=True)
class ClassSamplingConfig(DrawingConfig):
    """How an image of a class is drawn."""

    guidance: float = 1.0
    """Scale s of v_guide + s (v - v_guide): 1 = plain conditional. The guide is the same model without the class
    (Ho and Salimans 2022), or a weaker model with it (AutoGuidance, Karras et al. 2024; the paper: s = 2.05, the same
    run at epoch 20).
    """
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times (1 = noise) above the first and up to the second are guided; at others only v is computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scale("guidance", self.guidance)
        check_interval(self.guidance_interval)


class GuidedClassVelocity:
    """The velocity of one batch under guidance: a `Velocity` of generator/solvers.py."""

    def __init__(
        self,
        model: ClassGenerator,
        labels_B: Tensor,
        config: ClassSamplingConfig,
        guide: ClassGenerator | None = None,
    ) -> None:
        self._model, self._config = model, config
        self._guide = model if guide is None else guide
        self._labels_B = labels_B
        self._guide_labels_B = (
            torch.full_like(labels_B, model.config.num_classes) if guide is None else labels_B
        )

    def __call__(self, x_BCYX: Tensor, t: float) -> Tensor:
        """[B, C, Y, X] -> the same."""
        t_B = torch.full((len(x_BCYX),), t, device=x_BCYX.device)
        v: Tensor = self._model(x_BCYX, t_B, self._labels_B)
        scale = self._config.guidance
        if scale == 1 or not is_guided(t, self._config.guidance_interval):
            return v
        v_guide: Tensor = self._guide(x_BCYX, t_B, self._guide_labels_B)
        return v_guide + scale * (v - v_guide)


@torch.no_grad()
def sample_class_latents(
    model: ClassGenerator,
    labels: Sequence[int],
    seeds: Sequence[int],
    config: ClassSamplingConfig,
    guide: ClassGenerator | None = None,
) -> Tensor:
    """One image for each label, float32 [N, C, Y, X] on the CPU, un-normalised: what a decoder takes.

    Noise comes from each image's own seed, so an image does not depend on what it is drawn together with (up to
    rounding). `guide`: AutoGuidance's weaker model; None: the same model without the class.
    """
    assert len(labels) == len(seeds) > 0
    shape = model.latents.shape
    device = model.pos_embed.device
    times = sampling_times(config.num_steps, resolve_shift(config.time_shift, shape))
    latents = []
    for start in range(0, len(labels), config.batch_images):
        part = slice(start, start + config.batch_images)
        labels_B = torch.tensor(labels[part], device=device)
        velocity = GuidedClassVelocity(model, labels_B, config, guide)
        x_BCYX = integrate(velocity, draw_noise(shape, seeds[part]).to(device), times, config.solver)
        latents.append(x_BCYX.cpu())
    return unnormalise(torch.cat(latents), model.latents)
