"""Tells which kind of training a YAML describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from base.config import UserError, from_dict, resolve
from launch.runs.configs import ClassRun, GeneratorRun, TokenizerRun

Task = Literal["tokenizer", "t2i", "edit", "class"]
Run = TokenizerRun | GeneratorRun | ClassRun


def read_run(path: str, overrides: Sequence[str] = ()) -> tuple[Task, Run]:
    """The task and config of a training's YAML. Section `stage` marks a tokenizer, section `generator` a generator.

    An editing run has `task` (as in a run folder's config.json) or sets packing.source_dropout, because only edits have
    a source to drop. A class-conditional run sets packing.images_per_pack, because other packs count tokens. Raises
    UserError: neither or both sections; as `base.config.load`.
    """
    tree = resolve(path, overrides)
    kinds = [name for name in ("stage", "generator") if name in tree]
    if kinds == ["stage"]:
        return "tokenizer", from_dict(TokenizerRun, tree, where=path)
    if kinds == ["generator"]:
        packing = tree.get("packing")
        set_keys = packing if isinstance(packing, Mapping) else {}
        if "images_per_pack" in set_keys:
            return "class", from_dict(ClassRun, tree, where=path)
        run = from_dict(GeneratorRun, tree, where=path)
        return run.task or ("edit" if "source_dropout" in set_keys else "t2i"), run
    raise UserError(
        f"{path}: a tokenizer stage has a section 'stage', a generator a section 'generator'; this has "
        f"{' and '.join(kinds) or 'neither'} (its keys: {', '.join(map(str, tree)) or 'none'}); give one of these runs"
    )
