import random
from dataclasses import dataclass, field
from typing import Literal

import pytest
import yaml

from base import config
from base.config import ConfigError


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


def test_of_several_files_the_last_one_that_names_a_key_decides(tmp_path):
    """Parents in their order, then the file itself; files on the command line in theirs. Each key for itself."""
    order = ["a.yaml", "b.yaml", "ab.yaml", "c.yaml", "abc.yaml", "d.yaml"]
    extends = {"ab.yaml": ["a.yaml", "b.yaml"], "abc.yaml": ["ab.yaml", "c.yaml"]}
    keys = [*"uvw", *(f"{section}.{key}" for section in "xy" for key in "klm")]
    folders = {"a.yaml": tmp_path / "below", "b.yaml": tmp_path / "below"}
    (tmp_path / "below").mkdir()
    draw = random.Random(0)
    for _ in range(50):
        decided = {}
        for name in order:
            own = {key: f"{name} {key}" for key in keys if draw.random() < 0.4}
            decided |= own
            tree = {key: value for key, value in own.items() if "." not in key}
            for key in own.keys() - tree.keys():
                section, _, inner = key.partition(".")
                tree.setdefault(section, {})[inner] = own[key]
            if name in extends:
                parents = [folders.get(parent, tmp_path) / parent for parent in extends[name]]
                tree["extends"] = [str(parent.relative_to(tmp_path)) for parent in parents]
            write(folders.get(name, tmp_path) / name, yaml.safe_dump(tree))
        both = [tmp_path / "abc.yaml", tmp_path / "d.yaml"]
        assert config.flatten(config.resolve(both)) == decided
        assert config.flatten(config.resolve(both, ["x.k=1"])) == {**decided, "x.k": "1"}


def test_a_file_that_two_others_extend_is_no_circle(tmp_path):
    write(tmp_path / "base.yaml", "steps: 3\n")
    write(tmp_path / "a.yaml", "extends: base.yaml\nname: a\n")
    write(tmp_path / "b.yaml", "extends: base.yaml\ndepths: [7]\n")
    child = write(tmp_path / "child.yaml", "extends: [a.yaml, b.yaml]\n")
    assert config.load(Outer, child) == Outer(3, depths=(7,), name="a")


@pytest.mark.parametrize(
    ("extends", "message"),
    [
        ("a.yaml", "'extends' runs in a circle; remove one of them"),
        ("[b.yaml, a.yaml]", "'extends' runs in a circle; remove one of them"),
        ("[]", r"extends is \[\]; give a file, or a list of at least one file"),
        ("[b.yaml, 3]", r"extends is \['b.yaml', 3\]; give a file, or a list of at least one file"),
        ("[b.yaml, [c.yaml]]", "give a file, or a list of at least one file"),
        ("{b: b.yaml}", "give a file, or a list of at least one file"),
        ("''", "extends is ''; give a file, or a list of at least one file"),
        ('["b.yaml", "b\\0"]', "give a file, or a list of at least one file"),
        ("[b.yaml, none.yaml]", r"none\.yaml: no such config file"),
    ],
)
def test_extends_that_names_no_files_is_one_line(tmp_path, extends, message):
    write(tmp_path / "b.yaml", "steps: 3\n")
    path = write(tmp_path / "a.yaml", f"extends: {extends}\n")
    with pytest.raises(ConfigError, match=message) as error:
        config.load(Outer, path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_error_of_merged_files_names_them_all(tmp_path):
    paths = [write(tmp_path / "a.yaml", "steps: 3\n"), write(tmp_path / "b.yaml", "step: 4\n")]
    with pytest.raises(ConfigError) as error:
        config.load(Outer, paths)
    assert str(error.value).startswith(f"{paths[0]} + {paths[1]}: unknown key 'step'")


def test_a_key_that_stands_twice_is_refused_with_both_lines(tmp_path):
    path = write(tmp_path / "a.yaml", "steps: 3\ninner:\n  lr: 0.1\n  kind: b\n  lr: 0.2\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: .*key 'lr' stands twice, in lines 3 and 5; remove one"):
        config.load(Outer, path)
    path = write(tmp_path / "a.yaml", "steps: 3\n'steps': 4\n")
    with pytest.raises(ConfigError, match="key 'steps' stands twice, in lines 1 and 2"):
        config.load(Outer, path)
    with pytest.raises(ConfigError, match="key 'lr' stands twice"):
        config.load(Outer, write(tmp_path / "b.yaml", "steps: 3\n"), ["inner={lr: 1, lr: 2}"])


def test_a_merged_key_may_be_given_again(tmp_path):
    """`<<` says what holds unless the section says otherwise: that is no key that stands twice."""
    text = "inner: &a {lr: 0.1}\noptional: &b {<<: *a, lr: 0.2}\nsteps: 3\n"
    assert config.load(Outer, write(tmp_path / "a.yaml", text)) == Outer(3, Inner(0.1), Inner(0.2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"a.yaml: cannot be read \(Is a directory\)"),
        (b"steps: 3\nname: \xff\xfe", "a.yaml: not UTF-8 at byte 15"),
        (b"steps: " + b"[" * 100_000, "a.yaml: nested too deep for a config"),
        (b"steps: 3\nname: \x00", "a.yaml: not valid YAML"),
        (b"steps: 2026-13-45", "a.yaml: "),
    ],
)
def test_a_config_that_is_no_text_is_one_line(tmp_path, content, message):
    path = tmp_path / "a.yaml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as error:
        config.load(Outer, path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("number", ["1e999", ".inf", "-.inf", ".nan"])
def test_a_number_that_is_not_finite_is_refused(tmp_path, number):
    with pytest.raises(ConfigError, match=r"inner\.lr is .*; give a number"):
        config.load(Outer, write(tmp_path / "a.yaml", "steps: 3\n"), [f"inner.lr={number}"])


def test_a_value_is_shown_in_part_and_without_secrets(tmp_path):
    with pytest.raises(ConfigError) as error:
        config.from_dict(Outer, {"steps": "x" * 10_000})
    assert len(str(error.value)) < 400
    with pytest.raises(ConfigError) as error:
        config.from_dict(Outer, {"steps": 3, "inner": {"lr": "s3://me:geheim@host/a"}})
    assert "geheim" not in str(error.value)
