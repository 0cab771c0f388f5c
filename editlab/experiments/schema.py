"""Typed dataclasses from YAML: each wrong key, missing key or wrong type is one sentence that says how to fix it."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from editlab.errors import UserError

T = TypeVar("T")

_NAMES: Mapping[Any, str] = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def build(kind: type[T], content: Any, where: str) -> T:
    """An instance of a dataclass from a mapping of its fields; nested dataclasses are built alike.

    Args:
        kind: the dataclass; its type hints are the schema.
        content: what the YAML file holds.
        where: name of this part of the file, for messages.

    Raises:
        UserError: for a key that the dataclass lacks, a missing one, or a value of another type.
    """
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a mapping of {', '.join(_fields(kind))}, and is {_shown(content)}.")
    fields, hints = _fields(kind), get_type_hints(kind)
    for key in content:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            guess = f"did you mean {near[0]!r}?" if near else f"its keys are {', '.join(fields)}."
            raise UserError(f"{where} has an unknown key {str(key)!r}: {guess}")
    missing = [name for name, needed in fields.items() if needed and name not in content]
    if missing:
        raise UserError(f"{where} lacks the key {missing[0]!r}: add it.")
    return kind(**{name: _convert(value, hints[name], f"{where}: {name}") for name, value in content.items()})


def _fields(kind: Any) -> dict[str, bool]:
    """Names of a dataclass's fields that a file may set, and whether each must be there."""
    empty = dataclasses.MISSING
    return {f.name: f.default is empty and f.default_factory is empty for f in dataclasses.fields(kind) if f.init}


def _convert(value: Any, hint: Any, where: str) -> Any:
    """The value as its type hint wants it."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)  # type: ignore[arg-type]
    if origin in (Union, UnionType):
        return _one_of(value, arguments, where)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"{where} must be one of {', '.join(map(str, arguments))}, and is {_shown(value)}.")
        return value
    if origin in (tuple, list, Sequence):
        if not isinstance(value, list):
            raise UserError(f"{where} must be a list, and is {_shown(value)}: write it in brackets.")
        return tuple(_convert(one, arguments[0], f"{where}: item {i}") for i, one in enumerate(value, 1))
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{where} must be a mapping, and is {_shown(value)}.")
        return {str(key): _convert(one, arguments[1], f"{where}: {key}") for key, one in value.items()}
    return _plain(value, hint, where)


def _one_of(value: Any, kinds: Sequence[Any], where: str) -> Any:
    """A value of one of several types: None, one dataclass among several by its ``kind``, or the only type left."""
    if value is None and NoneType in kinds:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    if len(kinds) == 1:
        return _convert(value, kinds[0], where)
    classes = {get_args(get_type_hints(kind)["kind"])[0]: kind for kind in kinds}
    named = value.get("kind") if isinstance(value, Mapping) else None
    if named not in classes:
        raise UserError(f"{where} needs a 'kind' among {', '.join(classes)}, and has {_shown(named)}.")
    return build(classes[named], value, where)


def _plain(value: Any, kind: type, where: str) -> Any:
    """Text, a number or a truth value."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"{where} must be {_NAMES[kind]}, and is {_shown(value)}.")
    return value


def _shown(value: Any) -> str:
    text = "empty" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
