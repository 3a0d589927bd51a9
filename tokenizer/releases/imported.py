"""What an import gives: the report, and if all of it fits, the way to the autoencoder."""

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
    """An autoencoder from somebody else's weights."""

    report: Report
    provenance: Mapping[str, Any]
    """For the export's config.json: where the weights came from."""
    build: Callable[[], ImageAutoencoder]
    """Allocates and fills it, in evaluation mode; only where the report has no problems."""

    def write(self, folder: Path) -> str:
        """Saves it into an existing folder and says what it is."""
        model = self.build()
        model.save(folder, self.provenance)
        return f"latent {'x'.join(map(str, model.latent_shape))}, fingerprint {fingerprint(folder)[:12]}"


def shapes(module: nn.Module) -> Shapes:
    """Of every parameter and persistent buffer."""
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
