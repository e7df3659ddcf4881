"""What happened, in Chrome's trace format, as `timeline.trace` writes a real cold start.

A node is a process, a GPU a thread; times are microseconds since the trace's start.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Trace:
    """Spans, if anybody wants them; a long run makes many."""

    is_kept: bool = False
    _events: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)
    _lanes: dict[str, int] = field(default_factory=dict)

    def span(
        self, where: str, lane: str, what: str, start_s: float, end_s: float, size_bytes: int
    ) -> None:
        if not self.is_kept:
            return
        event = {
            "name": what,
            "ph": "X",
            "pid": self._places.setdefault(where, len(self._places)),
            "tid": self._lanes.setdefault(lane, len(self._lanes)),
            "ts": round(start_s * 1e6),
            "dur": round((end_s - start_s) * 1e6),
            "args": {"bytes": size_bytes} if size_bytes else {},
        }
        self._events.append(event)

    def chrome(self) -> dict[str, Any]:
        names = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": place}}
            for place, pid in self._places.items()
        ]
        return {"displayTimeUnit": "ms", "traceEvents": [*names, *self._events]}
