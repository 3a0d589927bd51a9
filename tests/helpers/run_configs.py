"""The configs of all commands that read a YAML, and the sections in them."""

from __future__ import annotations

import dataclasses
import typing

from launch.runs.configs import ClassRun, EncodeRun, GeneratorRun, TokenizerRun
from quickstart.ablation import AblationRun
from quickstart.chain import QuickstartRun
from quickstart.class_chain import QuickstartClassRun
from quickstart.pictures.source import EmojiConfig
from quickstart.train_judge import JudgeRun
from quickstart.train_standin import StandInRun

RUNS: tuple[type, ...] = (
    *(TokenizerRun, GeneratorRun, ClassRun, EncodeRun, JudgeRun, StandInRun),
    *(QuickstartRun, QuickstartClassRun, AblationRun, EmojiConfig),
)


def kinds(hint: object) -> set[type]:
    """What a field's type is made of, without its ranges."""
    return {hint} if not (inner := typing.get_args(hint)) else set().union(*map(kinds, inner))


def sections(config: type) -> set[type]:
    """A config's class and those of all sections that it may have."""
    found = {config}
    for hint in typing.get_type_hints(config).values():
        found |= {inner for kind in kinds(hint) if dataclasses.is_dataclass(kind) for inner in sections(kind)}
    return found
