"""Values of flags: sizes with units, numbers within bounds."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size_bytes(text: str) -> int:
    """Read "4GB" (1e9), "512MiB" (2**20) or a plain number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-zA-Z]*)", text.strip())
    if match is None or match[2].upper() not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 4GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def at_least(low: float, kind: Callable[[str], float] = float) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
        if not value >= low:
            raise argparse.ArgumentTypeError(f"{text} is below {low:g}")
        return value

    return number


def seconds(text: str) -> float:
    """Read a time that is finite and above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return value


def whole(low: int) -> Callable[[str], float]:
    return at_least(low, int)


def any_whole(text: str) -> int:
    """Read a whole number, which may be below zero."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number") from None
