"""The result of importing a generator: a report, and the model if every tensor fits.

For autoencoders: tokenizer/releases/import_result.py.
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
    """A generator made from published weights."""

    report: Report
    kind: str
    """The kind of model, in words."""
    allocate: Callable[[], ModelT]
    """Allocates the model on the CPU, without filling it."""
    tensors: Mapping[str, Tensor]
    """Tensors by our names; only if the report has no problems."""

    def build(self) -> ModelT:
        """The filled model on the CPU in fp32; only if the report has no problems."""
        model = self.allocate()
        load_exact(model, self.tensors, where="the imported weights")
        return model

    def write(self, folder: Path) -> str:
        """Saves the model into an existing folder and returns a line that describes it."""
        model = self.build()
        model.save(folder)
        return f"{self.kind} of latents {'x'.join(map(str, model.latents.shape))}"
