"""What an import gives: the report, and if all of it fits, the way to the autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from tokenizer.export import ImageAutoencoder
from tokenizer.releases.renaming import Report, Shapes


@dataclass(frozen=True)
class Imported:
    """An autoencoder from somebody else's weights."""

    report: Report
    provenance: Mapping[str, Any]
    """For the export's config.json: where the weights came from."""
    build: Callable[[], ImageAutoencoder]
    """Allocates and fills it, in evaluation mode; only where the report has no problems."""


def shapes(module: nn.Module) -> Shapes:
    """Of every parameter and persistent buffer."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
