"""What an import gives of a generator: the report, and if all of it fits, the model.

Of an autoencoder: tokenizer/releases/imported.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor

from generator.class_conditional.model import ClassGenerator
from generator.model import Generator
from tokenizer.releases.renaming import Report
from tokenizer.weights import load_exact

ModelT = TypeVar("ModelT", Generator, ClassGenerator)


@dataclass(frozen=True)
class ImportedGenerator(Generic[ModelT]):
    """A generator from somebody else's weights."""

    report: Report
    kind: str
    """In words."""
    allocate: Callable[[], ModelT]
    """The model on the CPU, not filled."""
    tensors: Mapping[str, Tensor]
    """By our names; only where the report has no problems."""

    def build(self) -> ModelT:
        """On the CPU in fp32; only where the report has no problems."""
        model = self.allocate()
        load_exact(model, self.tensors, where="the imported weights")
        return model

    def write(self, folder: Path) -> str:
        """Saves it into an existing folder and says what it is."""
        model = self.build()
        model.save(folder)
        return f"{self.kind} of latents {'x'.join(map(str, model.latents.shape))}"
