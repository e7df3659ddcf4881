"""The generate loop: continuous batching over all requests of a replica.

One thread owns everything that changes: it takes events from a queue, keeps as many forward passes
in flight as the replica has stages, and sends text while the next pass already runs.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from paraserve_backend.answer import Answer, Delta
from paraserve_backend.engine.batch import ForwardResult
from paraserve_backend.engine.batching import Advance, Batcher, ScheduledBatch
from paraserve_backend.engine.sequence import Sequence
from paraserve_backend.errors import Cancelled, ParaServeError, Unavailable

_log = logging.getLogger(__name__)
#: How often cancellation is looked for while no forward pass returns.
_IDLE_CHECK_S = 0.1


class Forward(Protocol):
    """One forward pass through all layers of the replica."""

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]: ...

    def close(self) -> None: ...


class Reply(Protocol):
    """Where one request's answer goes; used by the loop's thread alone."""

    def send(self, delta: Delta) -> None: ...

    def fail(self, error: ParaServeError) -> None: ...

    def is_cancelled(self) -> bool: ...


class Gauges(Protocol):
    """Receives the loop's state after every turn."""

    def update(self, *, running: int, waiting: int, kv_blocks_used: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    sequence: Sequence
    answer: Answer
    reply: Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class _Returned:
    batch: ScheduledBatch
    future: Future[ForwardResult]


class GenerateLoop:
    """The continuous batching loop; `add` may be called from any thread."""

    def __init__(
        self, batcher: Batcher, forward: Forward, gauges: Gauges, batches_in_flight: int
    ) -> None:
        self._batcher = batcher
        self._forward = forward
        self._gauges = gauges
        self._batches_in_flight = batches_in_flight
        self._num_in_flight = 0
        self._requests: dict[Sequence, Request] = {}
        self._events: queue.SimpleQueue[Request | _Returned | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        self._events.put(request)

    def close(self) -> None:
        """Stop after the passes in flight; whoever is still running gets an error."""
        self._events.put(None)
        self._thread.join()
        self._forward.close()

    def _run(self) -> None:
        while True:
            event = self._next_event()
            if event is None:
                break
            if isinstance(event, Request):
                self._join(event)
            elif isinstance(event, _Returned):
                self._digest(event)
            self._fill()
            if self._drop_cancelled():
                self._fill()
            self._update_gauges()
        for sequence in list(self._requests):
            self._end(sequence, Unavailable("The model is being unloaded; send the request again."))

    def _next_event(self) -> Request | _Returned | bool | None:
        """Wait for an event; `False` when only cancellation is to be looked at."""
        if self._batcher.is_empty:
            self._batcher.check_integrity()
            return self._events.get()
        try:
            return self._events.get(timeout=_IDLE_CHECK_S)
        except queue.Empty:
            return False

    def _join(self, request: Request) -> None:
        self._requests[request.sequence] = request
        self._batcher.add(request.sequence)

    def _digest(self, returned: _Returned) -> None:
        self._num_in_flight -= 1
        error = returned.future.exception()
        if error is not None:
            self._fail(returned.batch, error)
            return
        advances = self._batcher.complete(returned.batch, returned.future.result())
        # The next pass starts before this one's text is made and sent.
        self._fill()
        for advance in advances:
            self._deliver(advance)

    def _fail(self, batch: ScheduledBatch, error: BaseException) -> None:
        if not isinstance(error, ParaServeError):
            _log.error("a forward pass failed", exc_info=error)
            error = Unavailable("A forward pass failed inside the engine; see the server's log.")
        for sequence in self._batcher.fail(batch):
            self._end(sequence, error)

    def _fill(self) -> None:
        while self._num_in_flight < self._batches_in_flight:
            batch = self._batcher.schedule()
            if batch is None:
                return
            self._num_in_flight += 1
            self._forward.submit(batch).add_done_callback(partial(self._return, batch))

    def _return(self, batch: ScheduledBatch, future: Future[ForwardResult]) -> None:
        self._events.put(_Returned(batch=batch, future=future))

    def _deliver(self, advance: Advance) -> None:
        """Send what the newest token completes; a stop word ends the sequence here."""
        sequence = advance.sequence
        request = self._requests.get(sequence)
        if request is None:
            return
        delta = request.answer.add(advance.token, sequence.finish_reason)
        if delta is None:
            return
        request.reply.send(delta)
        if delta.finish_reason is not None:
            del self._requests[sequence]
            self._batcher.drop(sequence)

    def _drop_cancelled(self) -> bool:
        """Free what cancelled requests hold. Asking is a round trip: a pass runs meanwhile."""
        cancelled = [s for s, request in self._requests.items() if request.reply.is_cancelled()]
        for sequence in cancelled:
            self._batcher.drop(sequence)
            self._end(sequence, Cancelled("The client cancelled the request."))
        return bool(cancelled)

    def _end(self, sequence: Sequence, error: ParaServeError) -> None:
        request = self._requests.pop(sequence, None)
        if request is not None:
            request.reply.fail(error)

    def _update_gauges(self) -> None:
        self._gauges.update(
            running=len(self._batcher.running),
            waiting=len(self._batcher.waiting),
            kv_blocks_used=self._batcher.pool.num_used,
        )
