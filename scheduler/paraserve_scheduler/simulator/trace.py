"""What happened in a simulation, in Chrome's trace format, with the names of a real cold start.

A node is a process, a kind of step on one of its GPUs a thread; times are microseconds since the
run's start. A real trace is of one replica; here every event says of which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEDULER = "scheduler"


@dataclass(slots=True)
class Trace:
    """Spans, if anybody wants them; a long run makes many."""

    is_kept: bool = False
    _events: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)
    _lanes: dict[tuple[int, str], int] = field(default_factory=dict)

    def span(
        self,
        node: str,
        gpu: int,
        what: str,
        start_s: float,
        end_s: float,
        *,
        replica: str,
        size_bytes: int = 0,
    ) -> None:
        if self.is_kept:
            event = self._event(node, gpu, what, start_s, replica)
            if size_bytes:
                event["args"]["bytes"] = size_bytes
            self._events.append(event | {"ph": "X", "dur": round((end_s - start_s) * 1e6)})

    def instant(
        self, what: str, at_s: float, *, replica: str, node: str = SCHEDULER, gpu: int = 0
    ) -> None:
        if self.is_kept:
            scope = "g" if node == SCHEDULER else "p"
            event = self._event(node, gpu, what, at_s, replica)
            self._events.append(event | {"ph": "i", "s": scope})

    def _event(
        self, node: str, gpu: int, what: str, start_s: float, replica: str
    ) -> dict[str, Any]:
        return {
            "name": what,
            "pid": self._places.setdefault(node, len(self._places)),
            "tid": self._lanes.setdefault((gpu, what.split()[0]), len(self._lanes)),
            "ts": round(start_s * 1e6),
            "args": {"replica": replica},
        }

    def chrome(self) -> dict[str, Any]:
        names = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": place}}
            for place, pid in self._places.items()
        ]
        return {"displayTimeUnit": "ms", "traceEvents": [*names, *self._events]}
