"""Parses JSON that a client wrote, and refuses what is cheap to send and dear to read.

That is numbers of very many digits, for which Python's own parser raises no error of JSON, and very
deep nesting. How large a text may be is its caller's to say. Not msgspec: it is two to four times
as fast, but parsing is the smaller part of reading a request, and its errors say less.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from paraserve_backend.errors import InvalidRequest

MAX_DIGITS = 100
MAX_DEPTH = 32
#: Digits in strings match too: what is found only decides whether each number is looked at.
_MANY_DIGITS = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")


def parse_json(
    text: str, what: str, *, parse_constant: Callable[[str], object] | None = None
) -> Any:
    """Parse a JSON text; of equal keys the last one counts.

    Args:
        text: what a client wrote.
        what: names the text in errors.
        parse_constant: is called with NaN, Infinity or -Infinity, as by `json.loads`.

    Raises:
        json.JSONDecodeError: it is not JSON.
        InvalidRequest: it has a number of too many digits, or is nested too deeply.
    """

    def whole_number(written: str) -> int:
        digits = len(written.removeprefix("-"))
        if digits > MAX_DIGITS:
            raise InvalidRequest(
                f"{what} has a whole number of {digits} digits; {MAX_DIGITS} at most."
            )
        return int(written)

    parse_int = whole_number if _MANY_DIGITS.search(text) else None
    try:
        value = json.loads(text, parse_int=parse_int, parse_constant=parse_constant)
        if text.count("[") + text.count("{") > MAX_DEPTH:
            _check_depth(value)
    except RecursionError:
        raise InvalidRequest(f"{what} is nested too deeply; {MAX_DEPTH} levels at most.") from None
    return value


def _check_depth(value: object) -> None:
    """Raise RecursionError where the parser could not."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            for child in (each.values() if isinstance(each, dict) else each)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return
    raise RecursionError
