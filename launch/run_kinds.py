"""Which kind of training a YAML describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from engine.config import UserError, from_dict, resolve
from launch.runs import GeneratorRun, TokenizerRun

Task = Literal["tokenizer", "t2i", "edit"]


def read_run(path: str, overrides: Sequence[str] = ()) -> tuple[Task, TokenizerRun | GeneratorRun]:
    """By its sections: `stage` is a tokenizer's, `generator` a generator's.

    An editing run is one that says so (`task`, as a run folder's config.json does) or that sets packing.source_dropout:
    only edits have a source to drop. Raises UserError: neither or both, and what `engine.config.load` refuses.
    """
    tree = resolve(path, overrides)
    kinds = [name for name in ("stage", "generator") if name in tree]
    if kinds == ["stage"]:
        return "tokenizer", from_dict(TokenizerRun, tree, where=path)
    if kinds == ["generator"]:
        packing = tree.get("packing")
        if isinstance(packing, Mapping) and "images_per_pack" in packing:
            raise UserError(f"{path}: a class-conditional run; ask launch/train_class.py --dry-run")
        is_edit = isinstance(packing, Mapping) and "source_dropout" in packing
        run = from_dict(GeneratorRun, tree, where=path)
        return run.task or ("edit" if is_edit else "t2i"), run
    raise UserError(
        f"{path}: a tokenizer stage has a section 'stage', a generator a section 'generator'; this has "
        f"{' and '.join(kinds) or 'neither'} (its keys: {', '.join(map(str, tree)) or 'none'}); give one of these runs"
    )
