"""Classifier-free guidance: which branches a time needs, and how their velocities become one.

Shape suffixes: S samples, B branches, P latent tokens of one image (Y * X), C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from base.config import ConfigError
from generator.drawing import check_interval, check_scale, is_guided

Branch = Literal["none", "source", "full"]
"""What a velocity is conditioned on: nothing, the source images, or sources and text."""
Renorm = Literal["none", "global", "channel"]

EPSILON = 1e-8  # added to a norm that may be 0


@dataclass(frozen=True)
class GuidanceConfig:
    """How strongly an image follows its text and its sources."""

    text_guidance: float = 4.0
    """Scale of the text: 1 = plain conditional, larger follows the text more closely."""
    source_guidance: float = 2.0
    """Scale of the source images when editing: 1 = plain conditional, larger stays closer to the sources."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times (1 = noise) above the first and up to the second are guided; at others only the conditional branch is
    computed (Kynkäänniemi et al. 2024). Bagel: 0.4 and 1.
    """
    renorm: Renorm = "none"
    """Shortens a guided velocity that is longer than the conditional one: "global" over an image, "channel" token by
    token (Bagel's cfg_renorm_type).
    """
    renorm_min: float = 0.0
    """Least factor of the shortening (Bagel's cfg_renorm_min); 1 = never shorten."""

    def __post_init__(self) -> None:
        check_interval(self.guidance_interval)
        for name in ("text_guidance", "source_guidance"):
            check_scale(name, getattr(self, name))
        if not 0 <= self.renorm_min <= 1:
            raise ConfigError(f"renorm_min is {self.renorm_min}; give a factor from 0 to 1")


def branch_weights(config: GuidanceConfig, t: float, *, editing: bool) -> dict[Branch, float]:
    """The guided velocity at time t as weights of branches; branches that are not needed are left out.

    Text-to-image: v = v_none + s_txt (v_full - v_none) (Ho and Salimans 2022, eq. 6).
    Editing: v = v_none + s_src (v_src - v_none) + s_txt (v_full - v_src) (Brooks et al. 2023, eq. 3).
    """
    if not is_guided(t, config.guidance_interval):
        return {"full": 1.0}
    s_text, s_source = float(config.text_guidance), float(config.source_guidance)
    weights: dict[Branch, float]
    if editing:
        weights = {"none": 1 - s_source, "source": s_source - s_text, "full": s_text}
    else:
        weights = {"none": 1 - s_text, "full": s_text}
    kept = "full" if config.renorm != "none" else None  # renormalisation compares with its length
    return {branch: weight for branch, weight in weights.items() if weight != 0 or branch == kept}


def guide(v_SBPC: Tensor, weights: Mapping[Branch, float], config: GuidanceConfig) -> Tensor:
    """The weighted sum over the branches, in the order of `weights`, [S, P, C]; then renormalised, if asked.

    v |-> v * clamp(|v_full| / |v|, renorm_min, 1), norms over (P, C) or C, as in Bagel (modeling/bagel/bagel.py,
    _forward_flow), where "global" is over all images of a call.
    """
    # Products and sums, not matmul: previews are drawn under autocast, which would run matmul in bf16.
    v_SPC = torch.stack([weight * v_SBPC[:, i] for i, weight in enumerate(weights.values())]).sum(0)
    if config.renorm == "none" or len(weights) == 1:
        return v_SPC
    full_SPC = v_SBPC[:, list(weights).index("full")]
    axes = (1, 2) if config.renorm == "global" else (2,)
    found, wanted = (torch.linalg.vector_norm(v, dim=axes, keepdim=True) for v in (v_SPC, full_SPC))
    factor: Tensor = (wanted / (found + EPSILON)).clamp(config.renorm_min, 1.0)
    return v_SPC * factor
