"""Parsed JSON -> frozen dataclasses, strictly: nothing is guessed, converted or left out."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections import Counter
from functools import cache
from typing import Any


class DecodeError(ValueError):
    """The value is not of the kind that was asked for; the message names the place."""


def decode(kind: Any, raw: Any, where: str) -> Any:
    """Strict conversion of parsed JSON to `kind` (a dataclass, tuple, dict, union or scalar type).

    A field whose default is None may be left out.

    Raises:
        DecodeError: a key too many or too few, or a value of another type.
    """
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, raw, where)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, raw, where)
    if origin is tuple:
        expect(isinstance(raw, list), where, "a list", raw)
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(raw))
    if origin is dict:
        expect(isinstance(raw, dict), where, "an object", raw)
        return {key: decode(arguments[1], value, f"{where}.{key}") for key, value in raw.items()}
    if kind is float:
        expect(type(raw) in (int, float) and abs(raw) <= sys.float_info.max, where, "a finite number", raw)
        return float(raw)
    expect(type(raw) is kind, where, kind.__name__, raw)
    return raw


@cache  # evaluating the annotations takes most of the time of reading a manifest
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of the fields, and the names of those that must be there."""
    required = frozenset(field.name for field in dataclasses.fields(kind) if field.default is not None)
    return typing.get_type_hints(kind), required


def _decode_dataclass(kind: Any, raw: Any, where: str) -> Any:
    expect(isinstance(raw, dict), where, "an object", raw)
    hints, required = _fields(kind)
    unknown = sorted(set(raw) - set(hints))
    missing = sorted(required - set(raw))
    if unknown or missing:
        raise DecodeError(f"{where}: unknown keys {unknown}, missing keys {missing}")
    return kind(**{key: decode(hints[key], value, f"{where}.{key}") for key, value in raw.items()})


def _decode_union(arguments: tuple[Any, ...], raw: Any, where: str) -> Any:
    if raw is None and type(None) in arguments:
        return None
    members = [a for a in arguments if a is not type(None)]
    for member in members:
        if not dataclasses.is_dataclass(member) and type(raw) is member:
            return raw
    return decode(members[0], raw, where)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` for json that refuses a key given twice, with a ValueError."""
    result = dict(pairs)
    if len(result) != len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {twice!r}")
    return result


def expect(holds: bool, where: str, expected: str, found: Any) -> None:
    """Refuse what does not hold: DecodeError with the place, what was expected and what was found."""
    if not holds:
        raise DecodeError(f"{where}: expected {expected}, found {str(found)[:80]!r}")
