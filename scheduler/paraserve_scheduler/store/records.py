"""Frozen records as JSON and back, for the store; it knows the types our records are made of."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, cast

from paraserve_backend.telemetry.spans import Span

_Record = TypeVar("_Record")


def dump(record: object) -> str:
    """The JSON text of a dataclass instance made of records, tuples and plain values."""
    return json.dumps(_fields(record), default=_fields, separators=(",", ":"))


def load(record: type[_Record], text: str) -> _Record:
    """Read what `dump` wrote; raises `ValueError` for what another version wrote."""
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise TypeError(f"{type(values).__name__} instead of an object")
        return _build_record(record, values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"not a {record.__name__} of this version: {error}") from error


def _fields(record: object) -> dict[str, Any]:
    if isinstance(record, Span):
        return record.fields()
    if not is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"{record!r} is not a record")
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _build(hint: object, value: object) -> object:
    if value is None:
        return None
    plain = _without_none(hint)
    if plain is Span and isinstance(value, Mapping):
        return Span.parse(**value)
    if is_dataclass(plain) and isinstance(value, Mapping):
        return _build_record(cast(type[object], plain), value)
    if typing.get_origin(plain) is tuple and isinstance(value, list):
        item = typing.get_args(plain)[0]
        return tuple(_build(item, entry) for entry in value)
    if isinstance(plain, type) and issubclass(plain, StrEnum):
        return plain(str(value))
    return value


def _build_record(record: type[_Record], values: Mapping[str, object]) -> _Record:
    hints = typing.get_type_hints(record)
    return record(**{name: _build(hints[name], value) for name, value in values.items()})


def _without_none(hint: object) -> object:
    """`T` of `T | None`."""
    if not isinstance(hint, types.UnionType):
        return hint
    return next(part for part in typing.get_args(hint) if part is not types.NoneType)
