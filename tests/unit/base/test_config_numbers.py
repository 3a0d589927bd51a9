"""Every number of every config, replaced by one that cannot be meant: loaded, or refused in one line with its key."""

from __future__ import annotations

import dataclasses
import functools
import signal
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from base.bounds import MAX_COUNT, MAX_FEW, MAX_SECONDS, MAX_STEPS
from base.config import ConfigError, UserError, from_dict, resolve, to_dict
from generator.class_conditional.config import DitConfig, WideHeadConfig
from generator.config import DdtHeadConfig, GeneratorConfig, MotConfig
from helpers.run_configs import kinds
from helpers.run_configs import sections as all_sections
from launch.runs.configs import ClassRun, EncodeRun, GeneratorRun, TokenizerRun
from launch.sizing import dry_run
from quickstart.ablation import AblationRun
from quickstart.chain import QuickstartRun
from quickstart.class_chain import QuickstartClassRun
from quickstart.pictures.config import EmojiConfig
from quickstart.train_judge import JudgeRun
from quickstart.train_standin import StandInRun
from tokenizer.config import AutoencoderConfig, BridgeConfig, PixelDecoderConfig, RepresentationConfig

CONFIGS = Path(__file__).parents[3] / "configs"

ALL_SECTIONS = [
    "evaluation.every_steps=5", "evaluation.suites={generation: {reference: a.npz}}", "autoencoder=a",
]  # fmt: skip
RUNS: dict[str, tuple[type, str, list[str]]] = {
    "pivot": (TokenizerRun, "tokenizer/pivot.yaml", []),
    "bridge": (TokenizerRun, "tokenizer/bridge.yaml", ["stage.noise_tau=0.5", "pixels.resize_px=256"]),
    "decoder": (
        TokenizerRun, "tokenizer/decoder.yaml",
        ["evaluation={every_steps: 5, suites: {reconstruction: {}}, shards: a}", "stage.perceptual.depths=[3]"],
    ),
    "stand-in": (StandInRun, "quickstart/standin.yaml", []),
    "judge": (JudgeRun, "quickstart/judge.yaml", []),
    "t2i": (GeneratorRun, "generator/t2i_cc12m_ddt.yaml", [*ALL_SECTIONS, "evaluation.prompts=a.txt"]),
    "mixture": (GeneratorRun, "quickstart/t2i.yaml", ["data.shards=null", "data.mixture={a: {shards: x}}"]),
    "edit": (GeneratorRun, "quickstart/edit.yaml", ["data.max_epochs=3", "packing.caption_weights={a: 1}"]),
    "class": (ClassRun, "generator/class/ditdh_normalised.yaml", [*ALL_SECTIONS, "flow.align={}"]),
    "latents": (EncodeRun, "latents/cc12m.yaml", ["resize_px=256"]),
    "emoji": (EmojiConfig, "quickstart/data.yaml", []),
    "quickstart": (QuickstartRun, "quickstart/run.yaml", []),
    "classes": (QuickstartClassRun, "quickstart_class/run.yaml", []),
    "ablation": (AblationRun, "ablation/run.yaml", []),
}  # fmt: skip
STRANGE = (0, -1, 10**18, 1e18, 10**400, float("1e999"), float("nan"))
SHAPES = {
    *(RepresentationConfig, AutoencoderConfig, BridgeConfig, PixelDecoderConfig),
    *(MotConfig, GeneratorConfig, DdtHeadConfig, DitConfig, WideHeadConfig),
}
"""Configs of models' shapes, which say themselves what fits together."""
FREE = {"suites", "overrides"}
"""Options of other programs: what these refuse is told when they are built."""
Key = tuple[type, str]


def sections(config: Any) -> Iterator[Any]:
    """A config and all configs in it."""
    if dataclasses.is_dataclass(config):
        yield config
        for field in dataclasses.fields(config):
            yield from sections(getattr(config, field.name))
    elif isinstance(config, Mapping):
        for value in config.values():
            yield from sections(value)


@functools.cache
def numbers(cls: type) -> dict[str, set[type]]:
    """The fields of a config that hold numbers, and of which kinds."""
    hints = {name: kinds(hint) for name, hint in typing.get_type_hints(cls).items()}
    return {name: found for name, found in hints.items() if found & {int, float}}


@functools.cache
def run(name: str) -> Any:
    cls, path, overrides = RUNS[name]
    return from_dict(cls, resolve(CONFIGS / path, overrides))


@functools.cache
def examples() -> dict[Key, Any]:
    """For each field with numbers a section that has one there."""
    found: dict[Key, Any] = {}
    for name in RUNS:
        for section in sections(run(name)):
            for field in numbers(type(section)):
                if field not in FREE and getattr(section, field) not in (None, (), {}):
                    found.setdefault((type(section), field), section)
    return found


def replaced(value: Any, number: float) -> Any:
    """`number` in the place of a value, or of the last one of several."""
    if isinstance(value, dict):
        last = next(reversed(value))
        return {**value, last: replaced(value[last], number)}
    return [*value[:-1], number] if isinstance(value, list) else number


def refusal(cls: type, tree: Mapping[str, Any], what: object) -> str:
    """The line with which a config is refused, "" where it is not."""
    try:
        from_dict(cls, tree, where="a.yaml")
    except ConfigError as error:
        assert "\n" not in str(error) and str(error).startswith("a.yaml: "), what
        return str(error)
    except BaseException as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    return ""


def test_every_number_of_every_config_has_an_example() -> None:
    every = {
        (cls, field) for root, _, _ in RUNS.values() for cls in all_sections(root) for field in numbers(cls)
    }
    assert not {key for key in every - examples().keys() if key[1] not in FREE}


def test_every_number_is_loaded_or_refused_with_its_key() -> None:
    num_refused = 0
    for (cls, field), section in examples().items():
        tree = to_dict(section)
        for number in STRANGE:
            what = (cls.__name__, field, number)
            line = refusal(cls, {**tree, field: replaced(tree[field], number)}, what)
            num_refused += bool(line)
            if cls not in SHAPES:
                assert not line or field in line, (what, line)
    assert num_refused > 500


def test_no_whole_number_of_a_run_is_negative_or_beyond_all_use() -> None:
    """A new field without a range fails here: base/bounds.py has one for it."""
    for (cls, field), section in examples().items():
        if cls in SHAPES or int not in numbers(cls)[field]:
            continue
        tree = to_dict(section)
        for number in (-1, 1 << 63 if "seed" in field else MAX_STEPS + 1):
            what = (cls.__name__, field, number)
            assert refusal(cls, {**tree, field: replaced(tree[field], number)}, what), what


def test_no_weight_rate_or_time_of_a_run_is_negative() -> None:
    signed = {"text_guidance", "source_guidance", "guidance"}  # below 0: away from the text
    for (cls, field), section in examples().items():
        if cls not in SHAPES and numbers(cls)[field] >= {float} and field not in signed:
            tree = to_dict(section)
            assert refusal(cls, {**tree, field: replaced(tree[field], -1)}, (cls.__name__, field)), field


TINY = {
    "pivot": "quickstart/pivot.yaml",
    "t2i": "quickstart/t2i.yaml",
    "class": "quickstart_class/rpiae.yaml",
}
LOOKED_AT = ("data", "packing", "pixels", "flow", "engine")
"""Sections whose numbers are counts, sizes and rates of a run, not the shape of its model."""
DRY_S = 60
"""A dry run of these takes a second; one that makes a list of 10^12 takes all memory, or all day."""


@pytest.fixture
def in_time() -> Iterator[Callable[[object], None]]:
    """in_time(what): from now on the test has DRY_S."""
    doing: list[object] = [None]

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"{doing[0]}: still at it after {DRY_S} s")

    def begin(what: object) -> None:
        doing[0] = what
        signal.alarm(DRY_S)

    old = signal.signal(signal.SIGALRM, late)
    yield begin
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


def limits_of(cls: type, tree: dict[str, Any], field: str) -> Iterator[float]:
    """The least and the greatest of a few numbers that the section is loaded with."""
    taken = [
        number
        for number in (0, 1, MAX_FEW, MAX_COUNT, MAX_SECONDS, MAX_STEPS, 1e18)
        if not refusal(cls, {**tree, field: replaced(tree[field], number)}, field)
    ]
    yield from {*taken[:1], *taken[-1:]}


@pytest.mark.slow
@pytest.mark.parametrize("name", TINY)
def test_a_dry_run_of_the_least_and_the_greatest_numbers_ends(
    name: str, in_time: Callable[[object], None]
) -> None:
    cls, path = RUNS[name][0], TINY[name]
    loaded = from_dict(cls, resolve(CONFIGS / path))
    tree = to_dict(loaded)
    count = 0
    for section in (
        LOOKED_AT[2:3] if name == "pivot" else LOOKED_AT
    ):  # a tokenizer's takes longer: its code is run
        owner = getattr(loaded, section, None)
        for field in numbers(type(owner)) if dataclasses.is_dataclass(owner) else ():
            if tree[section][field] in (None, [], {}):
                continue
            for number in limits_of(type(owner), tree[section], field):
                what = (section, field, number)
                in_time(what)
                changed = {**tree[section], field: replaced(tree[section][field], number)}
                try:
                    assert dry_run.report(from_dict(cls, {**tree, section: changed}))
                except UserError as error:
                    assert "\n" not in str(error), what
                count += 1
    assert count > (2 if name == "pivot" else 20)
