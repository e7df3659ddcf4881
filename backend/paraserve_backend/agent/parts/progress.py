"""The status of one part, its changes for those who follow it, and failures as reports.

The status is used on the event loop only.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from paraserve_backend.errors import ParaServeError
from paraserve_backend.protocol.span_messages import span_message
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span, SpanName

#: Byte counts change all the time; followers get them at most this often.
_CHANGE_INTERVAL_S = 0.1
_FINAL = (pb.READY, pb.FAILED, pb.STOPPED)


class PartProgress:
    """The status of one part. `now` is the time in seconds since the Unix epoch."""

    def __init__(
        self, replica: str, stage: int, *, now: Callable[[], float], on_phase: Callable[[], None]
    ) -> None:
        self._status = pb.PartStatus(replica=replica, stage=stage, phase=pb.STARTING)
        self._now = now
        self._on_phase = on_phase
        self._changed = asyncio.Event()
        self._phase_changed = asyncio.Event()
        self.phase_since_s = now()

    @property
    def phase(self) -> pb.Phase.ValueType:
        return self._status.phase

    def snapshot(self) -> pb.PartStatus:
        copy = pb.PartStatus()
        copy.CopyFrom(self._status)
        return copy

    def move(self, phase: pb.Phase.ValueType, failure: pb.Failure | None = None) -> None:
        """Enter a phase; a failure stays with the part until it is removed."""
        self._status.phase = phase
        self.phase_since_s = self._now()
        if failure is not None:
            self._status.failure.CopyFrom(failure)
        self._phase_changed = _fire(self._phase_changed)
        self._notify()
        self._on_phase()

    def fetched(self, fetched_bytes: int, total_bytes: int) -> None:
        if (self._status.fetched_bytes, self._status.total_bytes) == (fetched_bytes, total_bytes):
            return
        self._status.fetched_bytes = fetched_bytes
        self._status.total_bytes = total_bytes
        self._notify()

    def use_slots(self, slots: Mapping[str, str]) -> None:
        """Note which slots' Triton models stand for models of the part."""
        self._status.slots.clear()
        self._status.slots.update(slots)
        self._notify()

    @contextmanager
    def span(self, name: SpanName, detail: str = "") -> Iterator[pb.Span]:
        """Record an interval of the cold start; the body may set its `bytes`."""
        running = Span(name=name, detail=detail, start_s=self._now(), end_s=0.0)
        self._status.spans.append(span_message(running))
        span = self._status.spans[-1]
        self._notify()
        try:
            yield span
        finally:
            span.end_s = self._now()
            self._notify()

    def add_spans(self, spans: Iterable[Span]) -> None:
        """Add the intervals that another process has measured."""
        self._status.spans.extend(map(span_message, spans))
        self._notify()

    async def follow(self) -> AsyncIterator[pb.PartStatus]:
        """Yield the status now and after changes, until it is READY, FAILED or STOPPED."""
        while True:
            changed, phase_changed = self._changed, self._phase_changed
            status = self.snapshot()
            yield status
            # Not the phase of now: the last status may have come while the other was taken.
            if status.phase in _FINAL:
                return
            await changed.wait()
            await _wait_at_most(phase_changed, _CHANGE_INTERVAL_S)

    def _notify(self) -> None:
        self._changed = _fire(self._changed)


def _fire(event: asyncio.Event) -> asyncio.Event:
    """Wake all who wait for `event` and return the one that the next change will fire."""
    event.set()
    return asyncio.Event()


async def _wait_at_most(event: asyncio.Event, limit_s: float) -> None:
    try:
        async with asyncio.timeout(limit_s):
            await event.wait()
    except TimeoutError:
        return


def failure_of(error: BaseException) -> pb.Failure:
    """Return the report of `error`; what is not one of ours is only named, see the agent's log."""
    if isinstance(error, ParaServeError):
        return pb.Failure(grpc_code=error.grpc_code, message=str(error))
    return pb.Failure(
        grpc_code=ParaServeError.grpc_code,
        message=f"The node agent failed with {type(error).__name__}; its log says where.",
    )


def first_cause(error: BaseException) -> BaseException:
    """Return what failed first in a task group, however deep."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
