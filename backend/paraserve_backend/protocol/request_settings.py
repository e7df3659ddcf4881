"""Finds the settings of a request, converts them and checks their types and ranges.

A setting may be a tensor, a key of `sampling_parameters` (JSON in a string, as vLLM's clients send
it) or a request parameter; the first wins. What a setting means is decided in `protocol.request`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.bounded_json import MAX_DIGITS, parse_json

SAMPLING_PARAMETERS = "sampling_parameters"
#: Largest whole number that tensors and the engine's batches hold.
INT32_MAX = 2**31 - 1
#: What a prompt or an answer is made of, by every name: errors and logs never show its values.
CONTENT = frozenset({"text_input", "input_ids", "stop_words", "stop", "bad_words"})
#: Most elements of a setting that takes several, such as stop words.
MAX_WORDS = 64
_MAX_SAMPLING_PARAMETERS_BYTES = 16 << 10
_MAX_WORD_CHARACTERS = 256
_MAX_SHOWN_CHARACTERS = 60


class Settings:
    """Looks settings up by name; several names for one setting are tried in turn.

    Every method raises InvalidRequest with a sentence that names the setting.
    """

    def __init__(self, tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._sampling_parameters = _parse_object(tensors, parameters)
        self._options = {**parameters, **self._sampling_parameters}
        self._known: set[str] = set()

    def find(self, name: str) -> Any:
        """Return a setting's one value as it came, `None` where it is left out."""
        self._known.add(name)
        if name not in self._tensors:
            return self._options.get(name)
        values = self._tensors[name]
        if len(values) != 1:
            raise InvalidRequest(f"Input '{name}' takes exactly one value.")
        return values[0]

    def number(
        self, name: str, *, default: float, low: float = -math.inf, high: float = math.inf
    ) -> float:
        value = self.find(name)
        if value is None:
            return default
        number = _number(name, value)
        if not (math.isfinite(number) and low <= number <= high):
            raise InvalidRequest(f"'{name}' is {number:g}; it must be {_range(low, high)}.")
        return number

    def integer(self, *names: str, default: int, low: int, high: int = INT32_MAX) -> int:
        given = self.optional_integer(*names, low=low, high=high)
        return default if given is None else given

    def optional_integer(self, *names: str, low: int, high: int = INT32_MAX) -> int | None:
        for name, value in [(name, self.find(name)) for name in names]:
            if value is None:
                continue
            number = _integer(name, value)
            if not low <= number <= high:
                limits = f"at least {low}" if number < low else f"at most {high}"
                raise InvalidRequest(f"'{name}' is {show(number)}; it must be {limits}.")
            return number
        return None

    def flag(self, name: str, *, default: bool) -> bool:
        value = self.find(name)
        if value is None:
            return default
        found = {"true": True, "false": False, "1": True, "0": False}.get(_lower(value))
        if found is None:
            raise InvalidRequest(f"'{name}' is {show(value)}; it takes true or false.")
        return found

    def words(self, *names: str) -> tuple[str, ...]:
        """Return the strings of a setting that takes one or several; empty ones are left out."""
        for name, values in [(name, self._list(name, "words")) for name in names]:
            words = tuple(word for value in values if (word := text(value, name)))
            if any(len(word) > _MAX_WORD_CHARACTERS for word in words):
                raise InvalidRequest(
                    f"'{name}' has a word of more than {_MAX_WORD_CHARACTERS} characters."
                )
            if words:
                return words
        return ()

    def token_ids(self, name: str) -> tuple[int, ...]:
        return tuple(_integer(name, value) for value in self._list(name, "tokens"))

    @property
    def asked_for(self) -> frozenset[str]:
        """Every name that some call has asked for."""
        return frozenset(self._known)

    def require_known(self) -> None:
        """Refuse what `sampling_parameters` holds that no other call has asked for."""
        for name in self._sampling_parameters:
            if name not in self._known:
                raise InvalidRequest(
                    f"'{SAMPLING_PARAMETERS}' has an unknown setting {show(name)}."
                )

    def differs(self, name: str, default: object) -> bool:
        """Tell whether a setting asks for anything but its default; empty values do not."""
        return any(
            value not in (None, "", b"", {}, default) and _lower(value) != _lower(default)
            for value in self._list(name, "values")
        )

    def _list(self, name: str, what: str) -> Sequence[Any]:
        """Return the elements of a setting; `what` they are is for the error where they are many.

        They are counted before any is looked at.
        """
        self._known.add(name)
        values = self._tensors.get(name, self._options.get(name))
        if values is None:
            return ()
        if not isinstance(values, list | tuple):
            return (values,)
        if len(values) > MAX_WORDS:
            raise InvalidRequest(f"'{name}' has {len(values)} {what}; {MAX_WORDS} at most.")
        return values


def text(value: object, name: str) -> str:
    """Return a string that came as bytes or text; raises InvalidRequest for anything else."""
    if not isinstance(value, str | bytes):
        raise InvalidRequest(f"'{name}' takes a string.")
    try:
        if isinstance(value, bytes):
            return value.decode()
        value.encode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"'{name}' is not valid UTF-8.") from None
    except UnicodeEncodeError:
        raise InvalidRequest(f"'{name}' has half a surrogate pair in its text.") from None
    return value


def show(value: object) -> str:
    """Return a value for an error message, cut where it is long.

    Never the value of what a prompt or an answer is made of: `CONTENT` names those.
    """
    if isinstance(value, str | bytes):
        value = value[: _MAX_SHOWN_CHARACTERS + 1]
    shown = repr(value)
    cut = _MAX_SHOWN_CHARACTERS - 3
    return shown if len(shown) <= _MAX_SHOWN_CHARACTERS else shown[:cut] + "..."


def _parse_object(
    tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]
) -> Mapping[str, Any]:
    given = tensors.get(SAMPLING_PARAMETERS) or [parameters.get(SAMPLING_PARAMETERS)]
    if given[0] is None:
        return {}
    written = text(given[0], SAMPLING_PARAMETERS)
    if len(written.encode()) > _MAX_SAMPLING_PARAMETERS_BYTES:
        raise InvalidRequest(
            f"'{SAMPLING_PARAMETERS}' has {len(written.encode())} bytes; "
            f"{_MAX_SAMPLING_PARAMETERS_BYTES} at most."
        )
    try:
        parsed = parse_json(written, f"'{SAMPLING_PARAMETERS}'")
    except ValueError:
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest(f"'{SAMPLING_PARAMETERS}' is not a JSON object in a string.")
    return parsed


def _number(name: str, value: Any) -> float:
    if not isinstance(value, bool) and _may_be_number(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return float(value)
    raise InvalidRequest(f"'{name}' is {show(value)}; it takes a number.")


def _integer(name: str, value: Any) -> int:
    is_fraction = isinstance(value, float) and bool(value % 1)
    if not isinstance(value, bool) and not is_fraction and _may_be_number(value):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            return int(value)
    raise InvalidRequest(f"'{name}' is {show(value)}; it takes a whole number.")


def _may_be_number(value: object) -> bool:
    """Refuse text that is too long for Python's own parsers, or that they take and nobody else."""
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return not isinstance(value, str) or (len(value) <= MAX_DIGITS and "_" not in value)


def _lower(value: object) -> str:
    return (value.decode(errors="replace") if isinstance(value, bytes) else str(value)).lower()


def _range(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:g}"
    return f"between {low:g} and {high:g}"
