"""Reads the settings of a daemon: one YAML file, with flags over it, into one frozen dataclass.

Every field of the dataclass is a key of the file and a flag (`memory_bytes`, `--memory-bytes`); its
annotation is the flag's help. Secrets are not settings: the cluster token comes from a file or the
environment, which is read here too.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import types
import typing
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from paraserve_backend.errors import InvalidRequest

TOKEN_VARIABLE = "PARASERVE_TOKEN"

Record = TypeVar("Record")


def parse_arguments(record: type[Record], argv: Sequence[str], *, program: str) -> Record:
    """Read the settings of a daemon from its command line and the file that `--config` names.

    Raises:
        InvalidRequest: see `load_config`.
    """
    parser = argparse.ArgumentParser(prog=program, allow_abbrev=False)
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with settings")
    hints = typing.get_type_hints(record)
    for field in _fields(record):
        parser.add_argument(
            _flag(field.name), metavar=_type_word(hints[field.name]), help=_help(record, field)
        )
    given = vars(parser.parse_args(argv))
    path = given.pop("config")
    overrides = {
        name: _flag_value(hints[name], text) for name, text in given.items() if text is not None
    }
    return load_config(record, path, overrides)


def load_config(
    record: type[Record], path: Path | None, overrides: Mapping[str, object] | None = None
) -> Record:
    """Build `record` from a YAML file (None: an empty one) with `overrides` on top.

    Raises:
        InvalidRequest: the file cannot be read, or a key is unknown, missing or of the wrong type.
    """
    values = _read_mapping(path) if path else {}
    return _build(record, values | dict(overrides or {}), str(path or "the settings"), "")


def read_token(token_file: Path | None, environ: Mapping[str, str]) -> str | None:
    """Return the cluster token: what the file holds, else PARASERVE_TOKEN, else None.

    Raises:
        InvalidRequest: the file cannot be read or is empty.
    """
    if token_file is None:
        return environ.get(TOKEN_VARIABLE) or None
    try:
        token = token_file.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidRequest(f"Cannot read token_file {token_file}: {error.strerror}.") from None
    if not token:
        raise InvalidRequest(f"token_file {token_file} is empty: write the cluster token into it.")
    return token


def _read_mapping(path: Path) -> dict[str, object]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise InvalidRequest(f"Cannot read {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise InvalidRequest(f"{path} is not valid YAML: it is not UTF-8 text.") from None
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{path} is not valid YAML: {_where(error)}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidRequest(f"{path} must hold settings as key: value lines.")
    return {str(key): value for key, value in content.items()}


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice: YAML would take the last and say nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[object] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key '{key.value}' is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else key)
        return super().construct_mapping(node, deep)


def _where(error: yaml.YAMLError) -> str:
    # The full text quotes the file, which may hold what should not be shown.
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"{error.problem} in line {error.problem_mark.line + 1}"
    return "it cannot be parsed"


def _build(record: type[Record], values: Mapping[str, object], where: str, prefix: str) -> Record:
    """Build a record; `prefix` is the path of keys that leads to it, e.g. "gateway."."""
    declared = {field.name: field for field in _fields(record)}
    for key in values:
        if key not in declared:
            raise InvalidRequest(
                _unknown(f"{prefix}{key}", [prefix + name for name in declared], where)
            )
    hints = typing.get_type_hints(record)
    arguments = {
        name: _convert(hints[name], value, where, prefix + name) for name, value in values.items()
    }
    for name, field in declared.items():
        if name not in arguments and _is_required(field):
            raise InvalidRequest(f"Setting '{prefix + name}' is missing from {where}.")
    return record(**arguments)


def _unknown(key: str, known: Sequence[str], where: str) -> str:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
    hint = f"; did you mean '{nearest[0]}'?" if nearest else "."
    return f"Unknown setting '{key}' in {where}{hint}"


def _convert(hint: object, value: object, where: str, key: str) -> object:
    if value is None and _is_optional(hint):
        return None
    plain = _required_part(hint)
    if is_dataclass(plain) and isinstance(value, Mapping):
        return _build(typing.cast(type[object], plain), value, where, f"{key}.")
    if typing.get_origin(plain) is tuple and isinstance(value, list | tuple):
        item = typing.get_args(plain)[0]
        return tuple(
            _convert(item, entry, where, f"{key}[{index}]") for index, entry in enumerate(value)
        )
    if plain is Path and isinstance(value, str | Path):
        return Path(value)
    if typing.get_origin(plain) is Mapping and isinstance(value, Mapping):
        return dict(value)  # for whoever it is handed on to, which checks it
    # bool is an int to Python, but not to whoever writes the file.
    if plain in (str, bool) and type(value) is plain:
        return value
    if (plain is int and type(value) is int) or (plain is float and type(value) in (int, float)):
        number = typing.cast(float, value)
        if 0 <= number <= sys.float_info.max:  # false for nan, too
            return plain(number)
    raise InvalidRequest(f"Setting '{key}' in {where} takes {_type_phrase(plain)}, not {value!r}.")


def _flag_value(hint: object, text: str) -> object:
    if _required_part(hint) in (str, Path):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


_PHRASES: dict[object, str] = {
    str: "text",
    int: "a whole number of at least 0",
    float: "a finite number of at least 0",
    bool: "true or false",
    Path: "a path",
}


def _type_phrase(plain: object) -> str:
    if typing.get_origin(plain) is tuple:
        return "a list"
    return _PHRASES.get(plain, "settings of its own, as key: value lines")


def _type_word(hint: object) -> str:
    plain = _required_part(hint)
    words: dict[object, str] = {str: "TEXT", int: "N", float: "X", bool: "BOOL", Path: "PATH"}
    return words.get(plain, "YAML")


def _is_optional(hint: object) -> bool:
    return isinstance(hint, types.UnionType) and types.NoneType in typing.get_args(hint)


def _required_part(hint: object) -> object:
    """Return `T` of `T | None`."""
    if not _is_optional(hint):
        return hint
    return next(part for part in typing.get_args(hint) if part is not types.NoneType)


def _is_required(field: Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _fields(record: type[Any]) -> tuple[Field[Any], ...]:
    return fields(record)


def _help(record: type[Any], field: Field[Any]) -> str:
    """What a field's annotation says, and what holds if nothing is given."""
    annotated = typing.get_type_hints(record, include_extras=True)[field.name]
    text = "".join(getattr(annotated, "__metadata__", ())).replace("%", "%%")
    if _is_required(field):
        return f"{text} (required)"
    simple = field.default if isinstance(field.default, str | int | float) else None
    return text if simple in (None, "") else f"{text} (default: {simple})".strip()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
