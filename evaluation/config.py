"""Choices of the evaluation that configs and command lines name. This module needs no torch."""

from __future__ import annotations

from typing import Literal

Distances = Literal["fp32", "fp16"]
"""Precision of the distances that precision and recall compare."""
Head = Literal[
    "dinov2_vits14",
    "dinov2_vits14_reg4",
    "dinov2_vitb14",
    "dinov2_vitb14_reg4",
    "dinov2_vitl14",
    "dinov2_vitl14_reg4",
    "dinov2_vitg14",
    "dinov2_vitg14_reg4",
]
"""A linear head that DINOv2's authors published."""
KEY_VARIABLE = "OPENAI_API_KEY"
"""The environment variable that holds a judge endpoint's key, unless another one is named."""
