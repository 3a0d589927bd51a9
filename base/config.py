"""Strict YAML -> frozen dataclasses (docs/architecture.md, section 6).

A config is a frozen dataclass beside its owner. A mistyped key is refused with the nearest valid one, a value
of the wrong type with the place it stands in, and any field can be overridden on the command line.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from base import limits
from base.errors import StoppedError as StoppedError
from base.errors import UserError as UserError
from base.model_sizes import check_sizes
from base.redaction import redacted

T = TypeVar("T")
LEAST_SIMILARITY = 0.75
"""Least difflib ratio of a mistyped key and the key that the error offers; one edit of five letters leaves 0.8."""
OTHER_NAMES = {
    "lr": ("learning_rate",),
    "steps": ("max_steps", "total_steps", "train_steps"),
    "grad_clip": ("max_grad_norm", "clip_grad_norm"),
    "images_per_pack": ("batch_size",),
    "batch_images": ("batch_size",),
}
"""Keys of this project -> what other trainers call them."""


class ConfigError(UserError):
    """A config does not fit its dataclass."""


@contextlib.contextmanager
def describing(where: str | Path) -> Iterator[None]:
    """Context for building what a config describes. Raises ConfigError, in one line: building fails on its values."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ConfigError(f"{where}: nothing can be built of these values ({reason})") from error


def counted(count: int, noun: str) -> str:
    """`1 GPU`, `8 GPUs`, `1,024 GPUs`: a number and its noun, for messages."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


Paths = str | Path | Sequence[str | Path]
"""One YAML file, or several that are merged in order."""


def load(cls: type[T], paths: Paths, overrides: Sequence[str] = ()) -> T:
    """Reads YAML into `cls`. `overrides` are `section.key=value`, values in YAML syntax.

    Of several files a later one wins. A top-level `extends: other.yaml`, or `extends: [a.yaml, b.yaml]`, is read first,
    in this order and relative to the file; the file then names only what differs.
    Raises ConfigError: missing file, bad YAML, unknown key, wrong type, missing key.
    """
    return from_dict(cls, resolve(paths, overrides), where=names_of(paths))


def names_of(paths: Paths) -> str:
    """The files of a config as messages name them: `a.yaml`, or `a.yaml + b.yaml`."""
    return " + ".join(map(str, _listed(paths)))


def resolve(paths: Paths, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain, unchecked values of YAML files and all that they extend. Raises ConfigError: no file, or bad YAML."""
    tree: dict[str, Any] = {}
    for path in _listed(paths):
        tree = _merge(tree, _read_tree(Path(path)))
    for override in overrides:
        _apply_override(tree, override)
    return tree


def from_dict(cls: type[T], tree: Mapping[str, Any], where: str = "config") -> T:
    """Builds the dataclass `cls` from nested mappings. Raises ConfigError naming `where` and the key."""
    built: T = _build(cls, tree, where, "")
    return built


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of a config, ready for YAML or JSON (tuples become lists)."""
    plain = _plain(dataclasses.asdict(config))
    assert isinstance(plain, dict)
    return plain


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"engine": {"steps": 5}} -> {"engine.steps": "5"}`: keys as people type them, values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def dump(config: Any) -> str:
    """YAML text of the resolved config, secrets masked. If it holds no secret, `load` gives an equal object."""
    return yaml.safe_dump(redacted(to_dict(config)), sort_keys=False)


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: 'extends' runs in a circle; remove one of them")
    try:
        text = limits.read_text(path, limits.CONFIG_BYTES)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such config file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: cannot be read ({reason}); give a YAML file") from None
    tree = _parse(text, str(path))
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected 'key: value' lines at the top level")
    merged: dict[str, Any] = {}
    for parent in _parents(tree, path):
        merged = _merge(merged, _read_tree(path.parent / parent, (*seen, path.resolve())))
    return _merge(merged, tree)


def _listed(paths: Paths) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else paths


def _parents(tree: dict[str, Any], path: Path) -> list[str]:
    """Takes `extends` out of `tree`: the files that it names, none without it. Raises ConfigError."""
    if "extends" not in tree:
        return []
    named = tree.pop("extends")
    parents = named if isinstance(named, list) else [named]
    if not parents or not all(isinstance(name, str) and name and "\0" not in name for name in parents):
        raise ConfigError(
            f"{path}: extends is {_shown('extends', named)}; give a file, or a list of at least one file"
        )
    return parents


def _merge(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(tree: dict[str, Any], override: str) -> None:
    name, sign, text = override.partition("=")
    if not sign or not name:
        raise ConfigError(f"override '{override}': write it as section.key=value")
    *sections, key = name.split(".")
    for section in sections:
        child = tree.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"override '{override}': '{section}' is a value, not a section")
        tree = child
    tree[key] = _parse(text, f"override '{override}'")


class _Loader(yaml.SafeLoader):
    """Loads plain values only and refuses a repeated key, of which YAML's own loader would take the last value."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for name, _ in node.value:
            line = name.start_mark.line + 1
            if isinstance(name, yaml.ScalarNode) and name.value in first:
                lines = f"lines {first[name.value]} and {line}"
                raise yaml.YAMLError(f"key '{name.value}' stands twice, in {lines}; remove one")
            if isinstance(name, yaml.ScalarNode):
                first[name.value] = line
        return node


def _parse(text: str, where: str) -> Any:
    """The values of a YAML text. Raises ConfigError."""
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{where}: nested too deep for a config") from None
    except ValueError as error:  # an impossible date or number
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


_CONFIG = ConfigDict(allow_inf_nan=False)
"""Refuses nan and infinity: YAML reads 1e999 as infinite."""
MAX_SHOWN = 200
"""Most characters of a value that a message quotes."""


def _shown(path: str, value: Any) -> str:
    """A value as a message quotes it: secrets masked, at most MAX_SHOWN characters."""
    try:
        text = repr(next(iter(redacted({path.rpartition(".")[2]: value}).values())))
    except RecursionError:
        return "this"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _build(hint: Any, value: Any, where: str, path: str) -> Any:
    """Builds one value of type `hint`: dataclasses recursively; pydantic validates everything else."""
    section = _dataclass_of(hint)
    if section is None or (value is None and section is not hint):
        try:
            return TypeAdapter(hint, config=_CONFIG).validate_python(value)
        except (ValidationError, RecursionError) as error:
            first = (
                error.errors()[0]
                if isinstance(error, ValidationError)
                else {"type": "", "msg": "nested too deep"}
            )
            if first["type"] == "finite_number":
                raise ConfigError(f"{where}: {path or 'top level'} is {value}; give a number") from None
            if bound := _bound(first):
                raise ConfigError(f"{where}: {path or 'top level'} is {value}; give {bound}") from None
            reason = first["msg"]
            raise ConfigError(
                f"{where}: {path or 'top level'}: {reason}, not {_shown(path, value)}"
            ) from None
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: {path or 'top level'}: expected a section of keys, not {_shown(path, value)}"
        )
    fields = {field.name: field for field in dataclasses.fields(section)}
    for key in value:
        if key not in fields:
            raise ConfigError(
                f"{where}: unknown key '{_join(path, str(key))}'; {_hint(str(key), section, path)}"
            )
    hints = typing.get_type_hints(section, include_extras=True)
    arguments = {key: _build(hints[key], item, where, _join(path, key)) for key, item in value.items()}
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in arguments:
            raise ConfigError(f"{where}: missing key '{_join(path, name)}'")
    try:
        check_sizes(arguments, f"{where}: {path}" if path else where)
    except UserError as error:
        raise ConfigError(str(error)) from None
    place = f"{where}: {path or 'top level'}"
    with describing(place):
        try:
            return section(**arguments)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None


def _bound(error: Mapping[str, Any]) -> str:
    """The bound that a number violates, in words, from pydantic's first error; "" for other errors."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    return next(
        (f"{word} {error['ctx'][name]}" for name, word in words.items() if name in error.get("ctx", {})), ""
    )


def _hint(key: str, section: type[Any], path: str) -> str:
    """Suggests the nearest valid key of this section or of a section inside it; if none is similar, lists the keys."""
    names = [field.name for field in dataclasses.fields(section)]
    for candidates in (names, _inner_keys(section)):
        spellings: dict[str, str] = {}
        for candidate in candidates:
            name = candidate.rpartition(".")[2]
            for spelling in (name, *OTHER_NAMES.get(name, ())):
                spellings.setdefault(spelling, candidate)
        if nearest := difflib.get_close_matches(key, spellings, n=1, cutoff=LEAST_SIMILARITY):
            return f"did you mean '{_join(path, spellings[nearest[0]])}'?"
    return f"valid keys: {', '.join(_join(path, name) for name in names)}"


def _inner_keys(section: type[Any], path: str = "") -> Iterator[str]:
    """Keys of the sections inside `section`, outer ones first."""
    hints = typing.get_type_hints(section)
    inner = {name: found for name, hint in hints.items() if (found := _dataclass_of(hint)) is not None}
    for name, found in inner.items():
        yield from (f"{path}{name}.{field.name}" for field in dataclasses.fields(found))
    for name, found in inner.items():
        yield from _inner_keys(found, f"{path}{name}.")


def _dataclass_of(hint: Any) -> Any:
    """The dataclass behind `hint` or `Optional[hint]`, else None."""
    if dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(hint) if dataclasses.is_dataclass(arg)]
        return inner[0] if len(inner) == 1 else None
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key
