"""How long forward passes take, and whether one that is under way takes too long.

A device that is stuck, and a stage that is stopped, are known by passes that do not return. Of an
external engine, the time from one step to the next counts as a pass. Used by the loop's thread
only.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

#: The first pass compiles kernels and allocates workspaces: on a new GPU that takes many seconds.
_FIRST_LIMIT_S = 60.0
#: No pass is late before that: a busy machine may pause a process for about a second.
_LEAST_LIMIT_S = 2.0
#: What a pass may take, as a multiple of the slowest one.
_PATIENCE = 8.0
#: The slowest of so many passes counts, so that one pause of the machine is forgotten again.
_REMEMBERED_PASSES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pass:
    num_tokens: int
    start_s: float


class PassClock:
    """`now_s` is a monotonic clock."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._numbers = itertools.count()
        self._under_way: dict[int, _Pass] = {}
        #: Tokens and seconds of the newest passes.
        self._returned: deque[tuple[int, float]] = deque(maxlen=_REMEMBERED_PASSES)

    def begin(self, num_tokens: int) -> int:
        """Count a pass as under way; returns what to call `end` with."""
        number = next(self._numbers)
        self._under_way[number] = _Pass(num_tokens=max(1, num_tokens), start_s=self._now_s())
        return number

    def enlarge(self, number: int, num_tokens: int) -> None:
        """Count these tokens, too, to a pass that is under way."""
        begun = self._under_way[number]
        self._under_way[number] = replace(begun, num_tokens=begun.num_tokens + num_tokens)

    def end(self, number: int, *, is_measure: bool) -> None:
        """Count it as returned; one that failed is no measure of the others."""
        ended = self._under_way.pop(number)
        if is_measure:
            self._returned.append((ended.num_tokens, self._now_s() - ended.start_s))

    @property
    def is_overdue(self) -> bool:
        now_s = self._now_s()
        late = [p for p in self._under_way.values() if now_s - p.start_s > _LEAST_LIMIT_S]
        return any(now_s - each.start_s > self._limit_s(each) for each in late)

    def _limit_s(self, under_way: _Pass) -> float:
        if not self._returned:
            return _FIRST_LIMIT_S
        slowest_s = max(seconds for _, seconds in self._returned)
        # A pass with more tokens than any other takes longer, at most by as much.
        most_tokens = max(tokens for tokens, _ in self._returned)
        larger = max(1.0, under_way.num_tokens / most_tokens)
        return max(_LEAST_LIMIT_S, _PATIENCE * slowest_s * larger)
