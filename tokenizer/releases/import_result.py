"""The result of an import: a report, and a function that builds the autoencoder if every tensor fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tokenizer.export import ImageAutoencoder, fingerprint
from tokenizer.releases.renaming import Report, Shapes


@dataclass(frozen=True)
class Imported:
    """An autoencoder made from published weights."""

    report: Report
    provenance: Mapping[str, Any]
    """Where the weights came from, for the export's config.json."""
    build: Callable[[], ImageAutoencoder]
    """Allocates and fills the autoencoder, in evaluation mode. Call it only if the report has no problems."""

    def write(self, folder: Path) -> str:
        """Saves the autoencoder into an existing folder and returns a line that describes it."""
        model = self.build()
        model.save(folder, self.provenance)
        return f"latent {'x'.join(map(str, model.latent_shape))}, fingerprint {fingerprint(folder)[:12]}"


def shapes(module: nn.Module) -> Shapes:
    """Shapes of every parameter and persistent buffer, by name."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
