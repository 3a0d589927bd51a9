from dataclasses import dataclass, field
from typing import Literal

import pytest

from engine import config
from engine.config import ConfigError


@dataclass(frozen=True)
class Inner:
    lr: float = 1e-3
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = field(default_factory=Inner)
    optional: Inner | None = None
    depths: tuple[int, ...] = (1, 2)
    name: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError("steps must be at least 1")


def write(path, text):
    path.write_text(text)
    return path


def test_values_types_and_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", "steps: 3\ninner: {lr: 1e-4}\noptional: {kind: b}\ndepths: [5]\n")
    assert config.load(Outer, path) == Outer(3, Inner(1e-4), Inner(kind="b"), (5,))


def test_dump_reads_back_to_the_same_config(tmp_path):
    original = Outer(3, Inner(2e-4, "b"), None, (7, 8), "x")
    assert config.load(Outer, write(tmp_path / "a.yaml", config.dump(original))) == original


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 3\ninner: {lrr: 1}", "unknown key 'inner.lrr'; did you mean 'inner.lr'?"),
        ("step: 3", "unknown key 'step'; did you mean 'steps'?"),
        ("inner: {}", "missing key 'steps'"),
        ("steps: many", "steps: Input should be a valid integer"),
        ("steps: 3\ninner: {kind: c}", "inner.kind: Input should be 'a' or 'b'"),
        ("steps: 0", "steps must be at least 1"),
        ("steps: 3\ninner: 5", "inner: expected a section of keys, not 5"),
        ("- 1", "expected 'key: value' lines"),
        ("steps: [", "not valid YAML"),
    ],
)
def test_bad_input_is_one_line_that_names_the_place(tmp_path, text, message):
    path = write(tmp_path / "bad.yaml", text)
    with pytest.raises(ConfigError) as error:
        config.load(Outer, path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: no such config file"):
        config.load(Outer, tmp_path / "none.yaml")


def test_overrides_change_and_create_sections(tmp_path):
    path = write(tmp_path / "a.yaml", "steps: 3\n")
    loaded = config.load(Outer, path, ["steps=9", "inner.lr=0.5", "optional.kind=b"])
    assert (loaded.steps, loaded.inner.lr, loaded.optional) == (9, 0.5, Inner(kind="b"))
    with pytest.raises(ConfigError, match="did you mean 'inner'"):
        config.load(Outer, path, ["iner.lr=1"])


def test_extends_names_only_what_differs(tmp_path):
    write(tmp_path / "base.yaml", "steps: 3\ninner: {lr: 0.1, kind: b}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\ninner: {lr: 0.2}\n")
    assert config.load(Outer, child) == Outer(3, Inner(0.2, "b"))
    write(tmp_path / "base.yaml", "extends: child.yaml\nsteps: 3\n")
    with pytest.raises(ConfigError, match="circle"):
        config.load(Outer, child)
