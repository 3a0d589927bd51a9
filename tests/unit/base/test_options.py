"""Command-line options of a dataclass: names, kinds, defaults, help; values pass through the loader of YAML files."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from base.bounds import Count
from base.config import ConfigError, from_dict
from base.options import add_options, fields_of, given_options, read_options


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What several commands share."""

    out: Path
    """Folder of the result."""


@dataclass(frozen=True, kw_only=True)
class Example(Shared):
    """One field of every kind."""

    num_images: Count = field(default_factory=lambda: 4)
    """Images, of which 5 % are shown."""
    scale: float | None = None
    """Factor; without it
    none."""
    kind: Literal["png", "jpeg"] = "png"
    """Format."""
    words: tuple[str, ...] = ()
    """Any number of words."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Two times."""
    is_strict: bool = False
    """Stop at once."""


def read(*words: str) -> Example:
    parser = argparse.ArgumentParser()
    add_options(parser, Example, names={"num_images": "images"})
    return read_options(Example, parser.parse_args(words))


def test_options_and_yaml_give_equal_configs() -> None:
    assert read("--out", "a") == from_dict(Example, {"out": "a"}) == Example(out=Path("a"))
    words = "--out a --images 2 --scale 3 --kind jpeg --words b c --interval 0 0.5 --is-strict"
    tree = {"out": "a", "num_images": 2, "scale": 3, "kind": "jpeg", "words": ["b", "c"]}
    assert read(*words.split()) == from_dict(Example, {**tree, "interval": [0, 0.5], "is_strict": True})


def test_a_bound_is_refused_as_in_a_yaml() -> None:
    with pytest.raises(ConfigError, match="options: num_images is 0; give at least 1"):
        read("--out", "a", "--images", "0")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--images 2", "required: --out"),
        ("--out a --images x", "invalid int value: 'x'"),
        ("--out a --kind gif", "invalid choice: 'gif'"),
        ("--out a --interval 0", "expected 2 arguments"),
        ("--out a --num-images 2", "unrecognized arguments: --num-images 2"),
    ],
)
def test_a_mistake_is_told_by_the_parser(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        read(*words.split())
    assert message in capsys.readouterr().err


def test_help_is_the_docstring_and_the_default() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example, without=("words",))
    told = " ".join(parser.format_help().split())
    assert "Images, of which 5 % are shown. Default: 4." in told and "Factor; without it none." in told
    assert told.index("Stop at once.") < told.index("Folder of the result."), "own fields come first"
    assert "--words" not in told


def test_options_of_values_that_come_from_elsewhere() -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, Example, optional=True)
    assert "Default" not in parser.format_help()
    assert given_options(Example, parser.parse_args([])) == {}
    assert given_options(Example, parser.parse_args(["--kind", "png"])) == {"kind": "png"}


def test_a_field_without_docstring_is_noticed() -> None:
    @dataclass(frozen=True)
    class Silent:
        number: int = 1

    with pytest.raises(AssertionError, match="Silent: a field without a docstring"):
        add_options(argparse.ArgumentParser(), Silent)


def test_fields_of_a_base() -> None:
    assert fields_of(Shared, Example(out=Path("a"))) == {"out": Path("a")}
