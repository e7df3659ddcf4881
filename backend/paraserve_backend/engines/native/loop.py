"""The generate loop: continuous batching over all requests of a replica.

One thread owns all state. It takes events from a queue, keeps as many forward passes in flight as
the replica has stages, and sends text while the next pass runs. The two sides of a hand-over are
`handover_source` and `handover_target`.

What fails of one request ends that request with an internal error, and nothing else; what concerns
all ends the process. No turn does work for each request that waits: what must be looked at is
looked at by time, so many at once.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Literal, Protocol

from paraserve_backend.daemon.guard import concerns_one, guarded, internal_error, log_failure
from paraserve_backend.engines.base import (
    MAX_WAITING,
    AnswerProbe,
    Gauges,
    LoopState,
    Reply,
    does_not_return,
    too_many_wait,
)
from paraserve_backend.engines.native.batcher import (
    Advance,
    Batcher,
    MalformedResult,
    ScheduledBatch,
)
from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.engines.native.handover_target import HandOverTarget
from paraserve_backend.engines.pass_clock import PassClock
from paraserve_backend.engines.pulse import TURN_S, Pulse
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
#: How often cancellation is looked for, whatever happens meanwhile.
_LOOK_S = 0.1
#: Asking whether a request is cancelled is a round trip to the server process, about 0.1 ms. So
#: many that run, and so many of all, are asked each time, in turn.
_ASKED_RUNNING = 64
_ASKED_IN_TURN = 16
#: Waiting requests that a turn sends to another replica; running ones wait for it.
_MOVED_PER_TURN = 16


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
    #: What the clock of the passes knows it by.
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _SetTargets:
    targets: tuple[Target, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    answer: AnswerProbe


_Event = Request | _Returned | _SetTargets | _Probe | LoopMessage


class GenerateLoop:
    """Continuous batching; any thread may call `add`, `probe`, `set_targets` and `receive`."""

    def __init__(
        self,
        batcher: Batcher,
        forward: Forward,
        gauges: Gauges,
        batches_in_flight: int,
        *,
        handover_source: HandOverSource,
        handover_target: HandOverTarget,
        pulse: Pulse,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._batcher = batcher
        self._forward = forward
        self._gauges = gauges
        self._batches_in_flight = batches_in_flight
        self._handover_source = handover_source
        self._handover_target = handover_target
        self._pulse = pulse
        self._now_s = now_s
        self._passes = PassClock(now_s)
        self._num_in_flight = 0
        #: In the order in which they are asked whether they are cancelled.
        self._requests: OrderedDict[TokenSequence, Request] = OrderedDict()
        self._next_look_s = 0.0
        #: Waited when the replica was told to hand over, or joined since.
        self._to_move: deque[TokenSequence] = deque()
        self._was_empty = False
        self._events: queue.SimpleQueue[_Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="generate", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        self._events.put(request)

    def probe(self, answer: AnswerProbe) -> None:
        """Have the loop itself say whether it turns and its passes return."""
        self._events.put(_Probe(answer=answer))

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
            if not self._passes.is_overdue:
                self._pulse.beat()
            event = self._next_event()
            if event is None:
                break
            if event is not False:
                self._take(event)
            self._let_go()
            self._fill()
            if self._drop_cancelled():
                self._fill()
            self._end_failed()
            self._update_gauges()
        self._pulse.close()
        for sequence in list(self._requests):
            self._end(sequence, Unavailable("The model is being unloaded; send the request again."))

    def _next_event(self) -> _Event | Literal[False] | None:
        """Wait for an event; `False` when only the time is to be looked at."""
        wait_s = TURN_S if self._is_empty() else _LOOK_S
        try:
            return self._events.get(timeout=0.0 if self._to_move else wait_s)
        except queue.Empty:
            return False

    def _is_empty(self) -> bool:
        is_empty = self._batcher.is_empty and not self._handover_target.blocks
        if is_empty and not self._was_empty:
            self._batcher.check_integrity()
        self._was_empty = is_empty
        return is_empty

    def _take(self, event: _Event) -> None:
        match event:
            case Request():
                self._join(event)
            case _Returned():
                self._digest(event)
            case _SetTargets():
                self._set_targets(event.targets)
            case _Probe():
                with guarded(logger, "the answer to a probe"):
                    event.answer(does_not_return() if self._passes.is_overdue else None)
            case _:
                with guarded(logger, "a message of another replica"):
                    self._hear(event)

    def _hear(self, message: LoopMessage) -> None:
        match message:
            case Offer():
                self._handover_target.offered(message)
            case Withdraw():
                self._handover_target.withdrawn(message.ticket)
            case Accepted() | Refused() | Complete():
                moved = self._handover_source.answered(message)
                if moved is not None:
                    self._move(moved.sequence, moved.target, moved.ticket)

    # ---- what concerns one request ----

    @contextmanager
    def _one(self, sequence: TokenSequence) -> Iterator[None]:
        """Guard the work for one request: where it fails, it alone ends."""
        try:
            yield
        except BaseException as error:
            if not concerns_one(error):
                raise
            log_failure(logger, "a request", error)
            self._batcher.drop(sequence)
            self._end(sequence, internal_error())

    def _join(self, request: Request) -> None:
        sequence = request.sequence
        # One that comes from another replica has waited there, or has begun: it is never refused.
        if len(self._batcher.waiting) >= MAX_WAITING and not request.tokens:
            with guarded(logger, "a request"):
                request.reply.fail(too_many_wait())
            return
        self._requests[sequence] = request
        with self._one(sequence):
            if request.tokens:
                self._batcher.adopt(sequence, self._handover_target.claim(request.ticket))
            else:
                self._batcher.add(sequence)
        if self._handover_source.is_active and request.is_resumable:
            self._to_move.append(sequence)

    def _move(self, sequence: TokenSequence, target: Target, ticket: int) -> None:
        request = self._requests.get(sequence)
        if request is None:
            return
        with self._one(sequence):
            self._handover_source.gone(sequence)
            self._batcher.drop(sequence)
            resume = Resume(
                ticket=ticket,
                seed=sequence.sampling.seed,
                max_tokens=sequence.max_tokens,
                tokens=tuple(request.tokens),
            )
            request.reply.move(target.replica, resume)
            del self._requests[sequence]

    def _deliver(self, advance: Advance) -> None:
        """Send what the newest token completes; a stop word ends the sequence here."""
        sequence = advance.sequence
        request = self._requests.get(sequence)
        if request is None:
            return
        with self._one(sequence):
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

    def _end(self, sequence: TokenSequence, error: ParaServeError) -> None:
        request = self._requests.pop(sequence, None)
        with guarded(logger, "the hand-over of a request"):
            self._handover_source.gone(sequence)
        if request is not None:
            with guarded(logger, "the error of a request"):
                request.reply.fail(error)

    def _end_failed(self) -> None:
        for sequence in self._batcher.take_failed():
            self._end(sequence, internal_error())

    def _is_wanted(self, sequence: TokenSequence) -> bool:
        """Ask the client's side of a request; one that was cancelled ends here."""
        request = self._requests.get(sequence)
        if request is None:
            return False
        with self._one(sequence):
            if not request.reply.is_cancelled():
                return True
            self._batcher.drop(sequence)
            self._end(sequence, Cancelled("The client cancelled the request."))
        return False

    def _drop_cancelled(self) -> bool:
        """Free what cancelled requests hold, if it is time to look for them."""
        now_s = self._now_s()
        if now_s < self._next_look_s:
            return False
        asked = dict.fromkeys(self._in_turn(_ASKED_IN_TURN))
        asked.update(dict.fromkeys(islice(self._batcher.running, _ASKED_RUNNING)))
        dropped = [s for s in asked if s in self._requests and not self._is_wanted(s)]
        self._next_look_s = self._now_s() + _LOOK_S
        return bool(dropped)

    def _in_turn(self, count: int) -> list[TokenSequence]:
        taken = list(islice(self._requests, count))
        for sequence in taken:
            self._requests.move_to_end(sequence)
        return taken

    # ---- hand-over ----

    def _set_targets(self, targets: tuple[Target, ...]) -> None:
        with guarded(logger, "the hand-over"):
            self._handover_source.set_targets(targets)
        self._to_move.clear()
        if targets:
            resumable = (s for s, request in self._requests.items() if request.is_resumable)
            self._to_move.extend(s for s in resumable if s in self._batcher.waiting)

    def _let_go(self) -> None:
        """Send away what may go: at once what has nothing in the KV cache."""
        self._handover_target.expire()
        if not self._handover_source.is_active:
            return
        with guarded(logger, "the hand-over"):
            self._handover_source.expire()
        for _ in range(min(_MOVED_PER_TURN, len(self._to_move))):
            sequence = self._to_move.popleft()
            if sequence in self._batcher.waiting:
                self._move(sequence, self._handover_source.next_target(), ticket=0)
        leaving = [s for s in self._batcher.running if self._may_leave(s)]
        if not self._handover_source.is_bare:
            with guarded(logger, "the hand-over"):
                self._handover_source.offer(leaving)
            return
        for sequence in leaving:
            self._move(sequence, self._handover_source.next_target(), ticket=0)

    def _may_leave(self, sequence: TokenSequence) -> bool:
        request = self._requests.get(sequence)
        is_decoding = bool(sequence.output_ids)
        return is_decoding and request is not None and request.is_resumable

    # ---- forward passes ----

    def _digest(self, returned: _Returned) -> None:
        self._num_in_flight -= 1
        error = returned.future.exception()
        self._passes.end(returned.number, is_measure=error is None)
        if error is not None:
            self._fail(returned.batch, error)
            return
        try:
            advances = self._batcher.complete(returned.batch, returned.future.result())
        except MalformedResult as malformed:
            self._fail(returned.batch, malformed)
            return
        for advance in advances:
            with self._one(advance.sequence):
                self._handover_source.returned(advance.sequence)
        # The next pass starts before this one's text is made and sent.
        self._fill()
        for advance in advances:
            self._deliver(advance)

    def _fail(self, batch: ScheduledBatch, error: BaseException) -> None:
        if not isinstance(error, ParaServeError):
            # It knows numbers alone, and what a device says of itself is needed.
            logger.error("a forward pass failed", exc_info=error)
            error = Unavailable("A forward pass failed inside the engine; see the server's log.")
        for sequence in self._batcher.fail(batch):
            self._end(sequence, error)

    def _fill(self) -> None:
        while self._num_in_flight < self._batches_in_flight:
            batch = self._batcher.schedule(self._is_wanted)
            if batch is None:
                return
            self._num_in_flight += 1
            number = self._passes.begin(batch.forward.num_tokens)
            self._submit(batch).add_done_callback(partial(self._return, batch, number))

    def _submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        try:
            return self._forward.submit(batch)
        except Exception as error:  # such as a thread that cannot be started
            failed: Future[ForwardResult] = Future()
            failed.set_exception(error)
            return failed

    def _return(self, batch: ScheduledBatch, number: int, future: Future[ForwardResult]) -> None:
        self._events.put(_Returned(batch=batch, future=future, number=number))

    def _update_gauges(self) -> None:
        counts = self._handover_source.counts
        with guarded(logger, "the report of the loop's state"):
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
