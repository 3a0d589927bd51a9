"""Classifier-free guidance: which branches a time needs, and how their velocities become one.

Shape suffixes: S samples, B branches, P latent tokens of one image (Y * X), C latent channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from generator.sampling_config import GuidanceConfig

Branch = Literal["none", "source", "full"]
"""What a velocity is conditioned on: nothing, the source images, or sources and text."""

EPSILON = 1e-8  # added to a norm that may be 0


def is_guided(t: float, interval: tuple[float, float]) -> bool:
    """Whether `t` lies above the first and up to the second time of the interval (Kynkäänniemi et al. 2024)."""
    low, high = interval
    return low < min(t, 1.0) <= high  # rounding may lift a shifted 1 above 1


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
