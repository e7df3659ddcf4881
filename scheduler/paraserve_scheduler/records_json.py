"""Frozen records as JSON and back, for the store. Knows the types our records are made of."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar

_Record = TypeVar("_Record")


def dump(record: object) -> str:
    """The JSON text of a dataclass instance made of records, tuples and plain values."""
    if not is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"{record!r} is not a record")
    return json.dumps(asdict(record), separators=(",", ":"))


def load(record: type[_Record], text: str) -> _Record:
    """Read what `dump` wrote; raises `ValueError` for what another version wrote."""
    try:
        built: _Record = _build(record, json.loads(text))
        return built
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a {record.__name__} of this version: {error}") from error


def _build(hint: Any, value: Any) -> Any:
    if value is None:
        return None
    hint = _without_none(hint)
    if is_dataclass(hint):
        return _build_record(hint, value)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        return tuple(_build(item, entry) for entry in value)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return hint(value)
    return value


def _build_record(record: Any, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(record)
    unknown = set(values) - {field.name for field in fields(record)}
    if unknown:
        raise KeyError(f"unknown fields {sorted(unknown)}")
    return record(**{name: _build(hints[name], value) for name, value in values.items()})


def _without_none(hint: Any) -> Any:
    if not isinstance(hint, types.UnionType):
        return hint
    return next(part for part in typing.get_args(hint) if part is not types.NoneType)
