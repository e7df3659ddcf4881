"""Spans of a cold start: who did what, from when to when.

The timeline is drawn from them, and the scheduler learns from them how long a start takes. In files
and in messages a span's name and detail are one string: `Span.label` writes it, `Span.parse` reads
it, and nobody else does either.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any


class SpanName(StrEnum):
    """What an interval of a cold start is spent on; or which moment it is, if it has no length."""

    # The scheduler's.
    PLAN = "plan"
    ALL_READY = "all ready"
    FIRST_TOKEN = "first token"
    HAND_OVER = "hand over"
    # The agent's.
    WRITE_MODELS = "write models"
    FETCH = "fetch"
    #: Detail: where some of the bytes came from.
    FETCH_FROM = "fetch from"
    #: Detail: the slot's Triton model.
    BIND = "bind"
    #: Detail: the Triton model.
    LOAD = "load"
    #: Detail: the layers.
    READY = "ready"
    # Those of roles.
    IMPORT_TORCH = "import torch"
    ALLOCATE_KV_CACHE = "allocate KV cache"
    ADOPT_WEIGHTS = "adopt weights"
    WAIT_FOR_WEIGHTS = "wait for weights"
    #: Detail: the engine.
    START_ENGINE = "start"
    # The simulator's.
    GROW = "grow"


_APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_NAMES = {name.value: name for name in SpanName}
_DETAILED = (
    SpanName.FETCH_FROM,
    SpanName.BIND,
    SpanName.LOAD,
    SpanName.READY,
    SpanName.START_ENGINE,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One interval; times are seconds since the Unix epoch, so that nodes can be compared."""

    #: `None`: this version does not know it; `detail` is the whole label.
    name: SpanName | None
    #: Which one, for names that several intervals of a start have; see `SpanName`.
    detail: str = ""
    start_s: float
    end_s: float
    size_bytes: int = 0

    @property
    def label(self) -> str:
        """Name and detail as one string, such as "load tiny.1"."""
        return " ".join(filter(None, (self.name, self.detail)))

    @classmethod
    def parse(cls, name: str, *, start_s: float, end_s: float, size_bytes: int = 0) -> Span:
        """Make the span whose label is `name`, whoever wrote it."""
        known, detail = _split(name)
        return cls(name=known, detail=detail, start_s=start_s, end_s=end_s, size_bytes=size_bytes)

    def fields(self) -> dict[str, Any]:
        """Return what a file keeps of it: the arguments of `parse`."""
        return {
            "name": self.label,
            "start_s": self.start_s,
            "end_s": self.end_s,
            "size_bytes": self.size_bytes,
        }


def _split(label: str) -> tuple[SpanName | None, str]:
    for name in _DETAILED:
        before, _, detail = label.partition(f"{name} ")
        if detail and not before:
            return name, detail
    found = _NAMES.get(label)
    return found, "" if found else label


class SpanFile:
    """Appends finished spans, one JSON object a line, for the node's agent to read."""

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextmanager
    def span(self, name: SpanName, detail: str = "") -> Iterator[None]:
        start_s = time.time()
        yield
        self.append(Span(name=name, detail=detail, start_s=start_s, end_s=time.time()))

    def append(self, span: Span) -> None:
        fd = os.open(self._path, _APPEND, 0o600)
        with open(fd, "a", encoding="utf-8") as file:
            file.write(json.dumps(span.fields()) + "\n")

    def read(self) -> tuple[Span, ...]:
        """Return the spans written so far; none if nobody wrote any."""
        if not self._path.exists():
            return ()
        lines = self._path.read_text(encoding="utf-8").splitlines()
        return tuple(Span.parse(**json.loads(line)) for line in lines)
