"""The generate loop's state as Prometheus gauges, on Triton's own metrics endpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

#: Name (after the prefix `paraserve_`) to description.
GAUGES = {
    "requests_running": "Requests that take part in forward passes.",
    "requests_waiting": "Requests that wait for KV blocks or a place in the batch.",
    "kv_blocks_used": "KV cache blocks owned by running requests.",
}
#: Setting one is a round trip to the server process (about 0.1 ms), so not on every token.
_INTERVAL_S = 0.1


class RateLimitedGauges:
    """Sets gauges at most every 0.1 s, but always when the loop falls idle."""

    def __init__(self, setters: Mapping[str, Callable[[float], None]]) -> None:
        self._setters = setters
        self._last: dict[str, float] = {}
        self._next_s = 0.0
        self.update(running=0, waiting=0, kv_blocks_used=0)

    def update(self, *, running: int, waiting: int, kv_blocks_used: int) -> None:
        now_s = time.monotonic()
        if running + waiting > 0 and now_s < self._next_s:
            return
        self._next_s = now_s + _INTERVAL_S
        values = {
            "requests_running": running,
            "requests_waiting": waiting,
            "kv_blocks_used": kv_blocks_used,
        }
        for name, value in values.items():
            if self._last.get(name) != value:
                self._setters[name](value)
                self._last[name] = value
