"""Spans of a cold start: who did what, from when to when. The timeline is drawn from them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One interval; times are seconds since the Unix epoch, so that nodes can be compared."""

    name: str
    start_s: float
    end_s: float
    size_bytes: int = 0


class SpanFile:
    """Appends finished spans, one JSON object a line, for the node's agent to read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start_s = time.time()
        yield
        self.append(Span(name=name, start_s=start_s, end_s=time.time()))

    def append(self, span: Span) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(span)) + "\n")

    def read(self) -> tuple[Span, ...]:
        """Return the spans written so far; none if nobody wrote any."""
        if not self._path.exists():
            return ()
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return tuple(Span(**json.loads(line)) for line in lines)
