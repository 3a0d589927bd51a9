"""Command-line options from the fields of a dataclass: a field is declared, explained and given its default once.

An option is named after its field (`num_images`: --num-images), and the docstring below the field is its help. Values
pass through the loader of YAML files (base/config.py), so both have equal bounds and messages.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from collections.abc import Collection, Mapping
from typing import Any, Literal, TypeVar, Union

from base.config import from_dict

T = TypeVar("T")


def add_options(
    parser: argparse._ActionsContainer,
    cls: type[Any],
    *,
    names: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    optional: bool = False,
) -> None:
    """Adds an option for each field of the dataclass `cls`, its own fields before inherited ones.

    The field's type decides what the option takes: bool makes a flag, Literal gives choices, a tuple takes several
    words. A field without default must be given, others have their default in the help; with `optional` neither is so,
    because values come from elsewhere. `names`: other names of fields, without dashes; `without`: fields that get no
    option. An option that is not given leaves nothing in the parsed arguments.
    """
    hints, fields = typing.get_type_hints(cls), {field.name: field for field in dataclasses.fields(cls)}
    texts = explanations(cls)
    assert fields.keys() <= texts.keys(), f"{cls.__name__}: a field without a docstring"
    for name, text in texts.items():
        if name in without:
            continue
        default = None if optional else _default(fields[name])
        if not (isinstance(default, bool) or default in (None, (), dataclasses.MISSING)):
            text = f"{text} Default: {default}."
        parser.add_argument(
            f"--{(names or {}).get(name, name).replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            required=default is dataclasses.MISSING,
            help=text.replace("%", "%%"),
            **_taken(hints[name]),
        )


def given_options(cls: type[Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """Field -> value, of the fields of the dataclass `cls` that the command line gives."""
    values = vars(arguments)
    return {field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values}


def read_options(cls: type[T], arguments: argparse.Namespace) -> T:
    """The dataclass `cls` of the options that `add_options` added. Raises ConfigError: a value is out of bounds."""
    return from_dict(cls, given_options(cls, arguments), where="options")


def fields_of(cls: type[Any], options: object) -> dict[str, Any]:
    """Field -> value in `options`, which has every field of the dataclass `cls`."""
    return {field.name: getattr(options, field.name) for field in dataclasses.fields(cls)}


def explanations(cls: type[Any]) -> dict[str, str]:
    """Field -> the docstring below it, on one line, for the fields of a dataclass and then of its bases."""
    found: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, cls.__mro__):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                assert isinstance(field.target, ast.Name) and isinstance(text.value, ast.Constant)
                found.setdefault(field.target.id, " ".join(str(text.value.value).split()))
    return found


def _default(field: dataclasses.Field[Any]) -> Any:
    """The default of a field; MISSING: it has none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _taken(hint: Any) -> dict[str, Any]:
    """What argparse needs to know of an option whose field has the type `hint`."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        (hint,) = (kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if hint is bool:
        return {"action": "store_true"}
    if typing.get_origin(hint) is Literal:
        return {"choices": typing.get_args(hint)}
    if typing.get_origin(hint) is tuple:
        kind, *more = typing.get_args(hint)
        return {"type": kind, "nargs": "+" if more == [...] else 1 + len(more)}
    return {"type": hint}
