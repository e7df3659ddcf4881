"""The generate loop: continuous batching over all requests of a replica.

One thread owns all state. It takes events from a queue, keeps as many forward passes in flight as
the replica has stages, and sends text while the next pass runs. The two sides of a hand-over are
`handover_source` and `handover_target`.
"""

from __future__ import annotations

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, Protocol

from paraserve_backend.engines.base import Gauges, LoopState, Reply
from paraserve_backend.engines.native.batcher import Advance, Batcher, ScheduledBatch
from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.engines.native.handover_target import HandOverTarget
from paraserve_backend.errors import Cancelled, ParaServeError, Unavailable
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.hand_over import (
    Accepted,
    Complete,
    LoopMessage,
    Offer,
    Refused,
    Target,
    Withdraw,
)
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken

logger = logging.getLogger(__name__)
#: How often cancellation is looked for while no forward pass returns.
_IDLE_CHECK_S = 0.1


class Forward(Protocol):
    """One forward pass through all layers of the replica."""

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    sequence: TokenSequence
    answer: Answer
    reply: Reply
    #: All its tokens so far, for whoever goes on with it.
    tokens: list[ChosenToken] = field(default_factory=list)
    #: Whether its sender can follow it to another replica.
    is_resumable: bool = False
    #: What its KV blocks have come under, if they have.
    ticket: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Returned:
    batch: ScheduledBatch
    future: Future[ForwardResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class _SetTargets:
    targets: tuple[Target, ...]


_Event = Request | _Returned | _SetTargets | LoopMessage


class GenerateLoop:
    """Continuous batching; any thread may call `add`, `set_targets` and `receive`."""

    def __init__(
        self,
        batcher: Batcher,
        forward: Forward,
        gauges: Gauges,
        batches_in_flight: int,
        *,
        handover_source: HandOverSource,
        handover_target: HandOverTarget,
    ) -> None:
        self._batcher = batcher
        self._forward = forward
        self._gauges = gauges
        self._batches_in_flight = batches_in_flight
        self._handover_source = handover_source
        self._handover_target = handover_target
        self._num_in_flight = 0
        self._requests: dict[TokenSequence, Request] = {}
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        self._events.put(request)

    def set_targets(self, targets: tuple[Target, ...]) -> None:
        """Hand all resumable requests over to these replicas, those to come too."""
        self._events.put(_SetTargets(targets=targets))

    def receive(self, message: LoopMessage) -> None:
        """Take in a message of another replica."""
        self._events.put(message)

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
            if event is not False:
                self._take(event)
            self._let_go()
            self._fill()
            if self._drop_cancelled():
                self._fill()
            self._update_gauges()
        for sequence in list(self._requests):
            self._end(sequence, Unavailable("The model is being unloaded; send the request again."))

    def _next_event(self) -> _Event | Literal[False] | None:
        """Wait for an event; `False` when only the time is to be looked at."""
        if self._batcher.is_empty and not self._handover_target.blocks:
            self._batcher.check_integrity()
            return self._events.get()
        try:
            return self._events.get(timeout=_IDLE_CHECK_S)
        except queue.Empty:
            return False

    def _take(self, event: _Event) -> None:
        match event:
            case Request():
                self._join(event)
            case _Returned():
                self._digest(event)
            case _SetTargets():
                self._handover_source.set_targets(event.targets)
            case Offer():
                self._handover_target.offered(event)
            case Withdraw():
                self._handover_target.withdrawn(event.ticket)
            case Accepted() | Refused() | Complete():
                moved = self._handover_source.answered(event)
                if moved is not None:
                    self._move(moved.sequence, moved.target, moved.ticket)

    def _join(self, request: Request) -> None:
        self._requests[request.sequence] = request
        if request.tokens:
            self._batcher.adopt(request.sequence, self._handover_target.claim(request.ticket))
        else:
            self._batcher.add(request.sequence)

    def _let_go(self) -> None:
        """Send away what may go: at once what has nothing in the KV cache."""
        self._handover_target.expire()
        if not self._handover_source.is_active:
            return
        self._handover_source.expire()
        for sequence in list(self._batcher.waiting):
            if self._requests[sequence].is_resumable:
                self._move(sequence, self._handover_source.next_target(), ticket=0)
        leaving = [s for s in self._batcher.running if self._may_leave(s)]
        if not self._handover_source.is_bare:
            self._handover_source.offer(leaving)
            return
        for sequence in leaving:
            self._move(sequence, self._handover_source.next_target(), ticket=0)

    def _may_leave(self, sequence: TokenSequence) -> bool:
        request = self._requests.get(sequence)
        is_decoding = bool(sequence.output_ids)
        return is_decoding and request is not None and request.is_resumable

    def _move(self, sequence: TokenSequence, target: Target, ticket: int) -> None:
        request = self._requests.pop(sequence)
        self._handover_source.gone(sequence)
        self._batcher.drop(sequence)
        resume = Resume(
            ticket=ticket,
            seed=sequence.sampling.seed,
            max_tokens=sequence.max_tokens,
            tokens=tuple(request.tokens),
        )
        request.reply.move(target.replica, resume)

    def _digest(self, returned: _Returned) -> None:
        self._num_in_flight -= 1
        error = returned.future.exception()
        if error is not None:
            self._fail(returned.batch, error)
            return
        advances = self._batcher.complete(returned.batch, returned.future.result())
        for advance in advances:
            self._handover_source.returned(advance.sequence)
        # The next pass starts before this one's text is made and sent.
        self._fill()
        for advance in advances:
            self._deliver(advance)

    def _fail(self, batch: ScheduledBatch, error: BaseException) -> None:
        if not isinstance(error, ParaServeError):
            logger.error("a forward pass failed", exc_info=error)
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
        if request.is_resumable:
            request.tokens.append(advance.token)
        delta = request.answer.add(advance.token, sequence.finish_reason)
        if delta is None:
            return
        request.reply.send(delta)
        if delta.finish_reason is not None:
            del self._requests[sequence]
            self._handover_source.gone(sequence)
            self._batcher.drop(sequence)

    def _drop_cancelled(self) -> bool:
        """Free what cancelled requests hold. Asking is a round trip: a pass runs meanwhile."""
        cancelled = [s for s, request in self._requests.items() if request.reply.is_cancelled()]
        for sequence in cancelled:
            self._batcher.drop(sequence)
            self._end(sequence, Cancelled("The client cancelled the request."))
        return bool(cancelled)

    def _end(self, sequence: TokenSequence, error: ParaServeError) -> None:
        request = self._requests.pop(sequence, None)
        self._handover_source.gone(sequence)
        if request is not None:
            request.reply.fail(error)

    def _update_gauges(self) -> None:
        counts = self._handover_source.counts
        self._gauges.update(
            LoopState(
                running=len(self._batcher.running),
                waiting=len(self._batcher.waiting),
                kv_blocks_used=self._batcher.pool.num_used,
                requests_moved=counts.handed_over,
                kv_blocks_sent_ahead=counts.blocks_ahead,
                kv_blocks_sent_held=counts.blocks_held,
            )
        )
