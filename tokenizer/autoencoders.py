"""Loads a saved autoencoder of any kind: RPiAE, RAE, or a convolutional VAE."""

from __future__ import annotations

from pathlib import Path

from tokenizer.config import Kind, read_tree
from tokenizer.export import ImageAutoencoder
from tokenizer.kl import KlAutoencoder
from tokenizer.rpiae import Autoencoder

CLASSES: dict[Kind, type[Autoencoder] | type[KlAutoencoder]] = {
    cls.kind: cls for cls in (Autoencoder, KlAutoencoder)
}


def load_autoencoder(directory: str | Path) -> ImageAutoencoder:
    """Loads a folder that `ImageAutoencoder.save` wrote, on the CPU, in evaluation mode.

    Raises UserError: no autoencoder in the folder, another format version, parameters that do not fit.
    """
    kind, _ = read_tree(directory)
    return CLASSES[kind].load(directory)
