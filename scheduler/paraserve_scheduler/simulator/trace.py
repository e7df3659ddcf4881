"""What happened in a simulation, in Chrome's trace format, with the names of a real cold start.

A node is a process, a kind of step on one of its GPUs a thread; times are microseconds since the
run's start. A real trace is of one replica; here every event says of which.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from paraserve_backend.telemetry.spans import Span, SpanName

SCHEDULER = "scheduler"


@dataclass(slots=True)
class Trace:
    """Spans, if anybody wants them; a long run makes many."""

    is_kept: bool = False
    _events: list[dict[str, Any]] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)
    _lanes: dict[tuple[int, SpanName | None], int] = field(default_factory=dict)

    def interval(self, span: Span, *, replica: str, node: str, gpu: int) -> None:
        if self.is_kept:
            event = self._event(span, replica, node, gpu)
            if span.size_bytes:
                event["args"]["bytes"] = span.size_bytes
            duration_s = span.end_s - span.start_s
            self._events.append(event | {"ph": "X", "dur": round(duration_s * 1e6)})

    def instant(
        self,
        name: SpanName,
        at_s: float,
        *,
        replica: str,
        detail: str = "",
        node: str = SCHEDULER,
        gpu: int = 0,
    ) -> None:
        if self.is_kept:
            scope = "g" if node == SCHEDULER else "p"
            span = Span(name=name, detail=detail, start_s=at_s, end_s=at_s)
            self._events.append(self._event(span, replica, node, gpu) | {"ph": "i", "s": scope})

    def _event(self, span: Span, replica: str, node: str, gpu: int) -> dict[str, Any]:
        return {
            "name": span.label,
            "pid": self._places.setdefault(node, len(self._places)),
            "tid": self._lanes.setdefault((gpu, span.name), len(self._lanes)),
            "ts": round(span.start_s * 1e6),
            "args": {"replica": replica},
        }

    def chrome(self) -> dict[str, Any]:
        names = [
            {"ph": "M", "name": "process_name", "pid": pid, "args": {"name": place}}
            for place, pid in self._places.items()
        ]
        return {"displayTimeUnit": "ms", "traceEvents": [*names, *self._events]}
