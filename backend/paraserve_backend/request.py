"""One generate request: tensors and parameters of either Triton LLM backend's clients, checked.

A setting may come as a tensor, inside `sampling_parameters` (JSON in a string, as vLLM's clients
send it), or as a request parameter (undeclared keys of the generate extension); the first wins.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paraserve_backend.engine.batch import Sampling
from paraserve_backend.errors import InvalidRequest

_DEFAULT_MAX_TOKENS = 16  # as vLLM's
_MAX_STOP_WORDS = 64
_SEEDS = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    #: Text to continue, or token ids; exactly one is set.
    text: str | None
    input_ids: tuple[int, ...] | None
    sampling: Sampling
    max_tokens: int
    stop_words: tuple[str, ...]
    ignore_eos: bool
    is_stream: bool
    echo: bool


def parse_request(
    tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any], *, fresh_seed: int
) -> GenerateRequest:
    """Read a request. `tensors` holds each input's elements, flat.

    Raises:
        InvalidRequest: a setting is malformed or out of range; the sentence names it.
    """
    settings = _Settings(tensors, parameters)
    text, input_ids = _prompt(tensors)
    return GenerateRequest(
        text=text,
        input_ids=input_ids,
        sampling=Sampling(
            temperature=settings.number("temperature", default=0.0, low=0.0),
            # vLLM writes -1 for "off".
            top_k=max(0, settings.integer("top_k", default=0, low=-1)),
            top_p=settings.number("top_p", default=1.0, low=0.0, high=1.0),
            seed=settings.seed(fresh_seed),
        ),
        max_tokens=settings.integer("max_tokens", default=_DEFAULT_MAX_TOKENS, low=1),
        stop_words=settings.words("stop_words", "stop"),
        ignore_eos=settings.flag("ignore_eos", default=False),
        is_stream=settings.flag("stream", default=False),
        echo=not settings.flag("exclude_input_in_output", default=True),
    )


def _prompt(
    tensors: Mapping[str, Sequence[Any]],
) -> tuple[str | None, tuple[int, ...] | None]:
    if "input_ids" in tensors and "text_input" in tensors:
        raise InvalidRequest("Give either 'text_input' or 'input_ids', not both.")
    if "input_ids" in tensors:
        ids = tuple(int(value) for value in tensors["input_ids"])
        if not ids:
            raise InvalidRequest("Input 'input_ids' is empty; give at least one token.")
        return None, ids
    if len(tensors.get("text_input", ())) != 1:
        raise InvalidRequest("Input 'text_input' is missing; it takes exactly one string.")
    return _text(tensors["text_input"][0], "text_input"), None


def _text(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, bytes):
        raise InvalidRequest(f"'{name}' takes a string.")
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidRequest(f"'{name}' is not valid UTF-8.") from None


class _Settings:
    """Looks a setting up in the three places it may come from."""

    def __init__(self, tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._options = {**parameters, **_sampling_parameters(tensors, parameters)}

    def _find(self, name: str) -> Any:
        if name in self._tensors:
            values = self._tensors[name]
            if len(values) != 1:
                raise InvalidRequest(f"Input '{name}' takes exactly one value.")
            return values[0]
        return self._options.get(name)

    def number(self, name: str, *, default: float, low: float, high: float = math.inf) -> float:
        value = self._find(name)
        if value is None:
            return default
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise InvalidRequest(f"'{name}' is {value!r}; it takes a number.") from None
        if not (math.isfinite(number) and low <= number <= high):
            limits = f"at least {low:g}" if high == math.inf else f"between {low:g} and {high:g}"
            raise InvalidRequest(f"'{name}' is {number:g}; it must be {limits}.")
        return number

    def integer(self, name: str, *, default: int, low: int) -> int:
        value = self._find(name)
        if value is None:
            return default
        try:
            number = int(value)
        except (TypeError, ValueError, OverflowError):
            raise InvalidRequest(f"'{name}' is {value!r}; it takes a whole number.") from None
        if number < low:
            raise InvalidRequest(f"'{name}' is {number}; it must be at least {low}.")
        return number

    def seed(self, fresh_seed: int) -> int:
        for name in ("seed", "random_seed"):
            if self._find(name) is None:
                continue
            seed = self.integer(name, default=0, low=0)
            if seed >= _SEEDS:
                raise InvalidRequest(f"'{name}' is {seed}; it must be below 2**64.")
            return seed
        return fresh_seed

    def flag(self, name: str, *, default: bool) -> bool:
        value = self._find(name)
        if value is None:
            return default
        if isinstance(value, str) and value.lower() in ("true", "false"):
            return value.lower() == "true"
        if isinstance(value, str):
            raise InvalidRequest(f"'{name}' is {value!r}; it takes true or false.")
        return bool(value)

    def words(self, *names: str) -> tuple[str, ...]:
        for name in names:
            values = self._tensors.get(name, self._options.get(name))
            if values is None:
                continue
            listed = [values] if isinstance(values, str | bytes) else list(values)
            if len(listed) > _MAX_STOP_WORDS:
                raise InvalidRequest(
                    f"'{name}' has {len(listed)} words; {_MAX_STOP_WORDS} at most."
                )
            return tuple(word for value in listed if (word := _text(value, name)))
        return ()


def _sampling_parameters(
    tensors: Mapping[str, Sequence[Any]], parameters: Mapping[str, Any]
) -> Mapping[str, Any]:
    given = tensors.get("sampling_parameters") or [parameters.get("sampling_parameters")]
    if given[0] is None:
        return {}
    try:
        parsed = json.loads(_text(given[0], "sampling_parameters"))
    except json.JSONDecodeError:
        parsed = None
    if not isinstance(parsed, dict):
        raise InvalidRequest("'sampling_parameters' is not a JSON object in a string.")
    return parsed
