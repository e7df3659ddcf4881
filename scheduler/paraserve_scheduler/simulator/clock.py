"""Virtual time: a heap of events; time jumps to the next one."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Heap:
    """Events by time. Nothing here waits: time jumps to the next event."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._count = 0

    def at(self, time_s: float, call: Callable[..., None], *arguments: Any) -> None:
        """Have `call` happen at `time_s`, or now if that has passed."""
        self._count += 1
        heapq.heappush(self._events, (max(time_s, self.now_s), self._count, call, arguments))

    def after(self, seconds: float, call: Callable[..., None], *arguments: Any) -> None:
        self.at(self.now_s + seconds, call, *arguments)

    def next_s(self) -> float:
        """When the next event is due; infinity if there is none."""
        return self._events[0][0] if self._events else float("inf")

    def step(self) -> None:
        """Let the next event happen."""
        self.now_s, _, call, arguments = heapq.heappop(self._events)
        call(*arguments)
