"""The generate loop when things go wrong, with a forward pass the test controls."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paraserve_backend.engines.base import MAX_WAITING, LoopState
from paraserve_backend.engines.native.batcher import (
    Batcher,
    BatchingLimits,
    BlockPool,
    ScheduledBatch,
)
from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.engines.native.handover_target import HandOverTarget
from paraserve_backend.engines.native.loop import GenerateLoop, Request
from paraserve_backend.engines.pulse import Pulse
from paraserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    ParaServeError,
    ResourceExhausted,
    Unavailable,
)
from paraserve_backend.generation.answer import Answer, Delta
from paraserve_backend.generation.sequence import History, TokenSequence
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.hand_over import Message, Offer, Target, Withdraw
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import ChosenToken, Sampling
from tests.support.limits import HANG_S

WORDS = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))


class HeldForward:
    """Every pass waits until the test settles it."""

    def __init__(self) -> None:
        self.passes: queue.SimpleQueue[tuple[ScheduledBatch, Future[ForwardResult]]]
        self.passes = queue.SimpleQueue()
        self.is_closed = False

    def submit(self, batch: ScheduledBatch) -> Future[ForwardResult]:
        future: Future[ForwardResult] = Future()
        self.passes.put((batch, future))
        return future

    def close(self) -> None:
        self.is_closed = True

    def answer_next(self) -> None:
        batch, future = self.passes.get(timeout=HANG_S)
        count = sum(row.sampling is not None for row in batch.forward.rows)
        future.set_result(ForwardResult(token_ids=(1,) * count, logprobs=(0.0,) * count))

    def fail_next(self, error: Exception) -> None:
        _, future = self.passes.get(timeout=HANG_S)
        future.set_exception(error)


@dataclass(eq=False)
class Reply:
    got: queue.SimpleQueue[Delta | ParaServeError] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    #: Where to, if it may move.
    moves: queue.SimpleQueue[str] | None = None
    num_asks: int = 0

    def send(self, delta: Delta) -> None:
        self.got.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.got.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        assert self.moves is not None, "this request may not move"
        self.moves.put(replica)

    def is_cancelled(self) -> bool:
        self.num_asks += 1
        return self.cancelled.is_set()


class NoGauges:
    def update(self, state: LoopState) -> None:
        pass


def nobody(_address: str, _message: Message) -> None:
    raise AssertionError("no message is due")


class Clock:
    """Stands still until the test moves it."""

    def __init__(self) -> None:
        self._now_s = 1000.0

    def __call__(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        self._now_s += seconds


def make_answer() -> Answer:
    return Answer(
        detokenizer=Detokenizer(WORDS, [0]),
        stop_words=StopWords(()),
        is_stream=True,
        prefix="",
        num_input_tokens=1,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    loop: GenerateLoop
    forward: HeldForward
    batcher: Batcher
    gauges: NoGauges
    clock: Clock
    pulse_file: Path

    def ask(
        self,
        max_tokens: int = 3,
        *,
        reply: Reply | None = None,
        answer: Answer | None = None,
        history: History | None = None,
        tokens: Sequence[ChosenToken] = (),
        is_resumable: bool = False,
    ) -> Reply:
        reply = reply or Reply()
        sequence = TokenSequence(
            prompt_ids=[0],
            sampling=Sampling(),
            history=history,
            max_tokens=max_tokens,
            output_ids=[token.token_id for token in tokens],
        )
        self.loop.add(
            Request(
                sequence=sequence,
                answer=answer or make_answer(),
                reply=reply,
                tokens=list(tokens),
                is_resumable=is_resumable,
            )
        )
        return reply

    def probe(self) -> ParaServeError | None:
        said: queue.SimpleQueue[ParaServeError | None] = queue.SimpleQueue()
        self.loop.probe(said.put)
        return said.get(timeout=HANG_S)

    def loop_has_turned(self) -> None:
        """Wait until it has taken in all there was, and has looked at the time once more."""
        self.probe()
        self.probe()

    def wait_until_free(self) -> None:
        """Answer passes until no request is left; then no KV block may be."""
        self.probe()
        deadline_s = time.monotonic() + HANG_S
        while not self.batcher.is_empty:
            assert time.monotonic() < deadline_s
            with suppress(queue.Empty):
                batch, future = self.forward.passes.get(timeout=0.01)
                count = sum(row.sampling is not None for row in batch.forward.rows)
                result = ForwardResult(token_ids=(1,) * count, logprobs=(0.0,) * count)
                future.set_result(result)
        assert self.batcher.pool.num_used == 0


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    limits = BatchingLimits(max_sequences=4, max_batch_tokens=8, batches_in_flight=1, block_size=4)
    batcher, forward, gauges, clock = (
        Batcher(limits, BlockPool(8)),
        HeldForward(),
        NoGauges(),
        Clock(),
    )
    handover_source = HandOverSource(
        nobody, inbox="", block_size=4, block_bytes=1, num_layers=1, now_s=time.monotonic
    )
    handover_target = HandOverTarget(batcher.pool, None, nobody, time.monotonic)
    pulse_file = tmp_path / "pulses" / "d.1"
    loop = GenerateLoop(
        batcher,
        forward,
        gauges,
        1,
        handover_source=handover_source,
        handover_target=handover_target,
        pulse=Pulse(pulse_file, clock),
        now_s=clock,
    )
    yield Bench(
        loop=loop,
        forward=forward,
        batcher=batcher,
        gauges=gauges,
        clock=clock,
        pulse_file=pulse_file,
    )
    if not forward.is_closed:
        loop.close()


def test_a_failed_pass_fails_its_requests_and_the_loop_goes_on(bench: Bench) -> None:
    lost = bench.ask()
    bench.forward.fail_next(DeadlineExceeded("The pipeline gave no answer within 1 s."))
    error = lost.got.get(timeout=HANG_S)
    assert isinstance(error, DeadlineExceeded)
    after = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    delta = after.got.get(timeout=HANG_S)
    assert isinstance(delta, Delta)
    assert delta.finish_reason == "length"


def test_a_broken_engine_is_not_quoted_to_the_client(bench: Bench) -> None:
    reply = bench.ask()
    bench.forward.fail_next(ZeroDivisionError("/secret/path.py"))
    error = reply.got.get(timeout=HANG_S)
    assert isinstance(error, Unavailable)
    assert str(error) == "A forward pass failed inside the engine; see the server's log."


def test_cancelling_is_noticed_while_a_pass_hangs(bench: Bench) -> None:
    reply = bench.ask()
    batch, future = bench.forward.passes.get(timeout=HANG_S)
    reply.cancelled.set()
    bench.clock.advance(0.1)
    assert isinstance(reply.got.get(timeout=HANG_S), Cancelled)
    # Its blocks are still written to; they are free once the pass is back.
    assert bench.batcher.pool.num_used == 1
    future.set_result(ForwardResult(token_ids=(1,), logprobs=(0.0,)))
    after = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    assert isinstance(after.got.get(timeout=HANG_S), Delta)
    assert bench.batcher.pool.num_used == 0
    assert batch.sequences[0].output_ids == []


def test_unloading_tells_whoever_is_still_running(bench: Bench) -> None:
    reply = bench.ask()
    bench.forward.passes.get(timeout=HANG_S)
    bench.loop.close()
    error = reply.got.get(timeout=HANG_S)
    assert isinstance(error, Unavailable)
    assert bench.forward.is_closed


# ---- what fails of one request ----

SECRET = "an answer that nobody else may read"


class PanicException(BaseException):
    """As a package written in Rust raises it."""


class Broken:
    """Fails as often as it is used, and quotes what it was given."""

    def __init__(self, error: type[BaseException]) -> None:
        self._error = error

    def __call__(self, *_: object) -> NoReturn:
        raise self._error(SECRET)


def break_answer(bench: Bench, broken: Broken) -> Reply:
    answer = make_answer()
    answer.add = broken  # type: ignore[method-assign, assignment]
    return bench.ask(answer=answer)


def break_send(bench: Bench, broken: Broken) -> Reply:
    reply = Reply()
    reply.send = broken  # type: ignore[method-assign, assignment]
    return bench.ask(reply=reply)


def break_question(bench: Bench, broken: Broken) -> Reply:
    reply = Reply()
    reply.is_cancelled = broken  # type: ignore[method-assign]
    return bench.ask(reply=reply)


def break_sampling(bench: Bench, broken: Broken) -> Reply:
    history = History(Sampling(), [0])
    history.sampling = broken  # type: ignore[method-assign]
    return bench.ask(history=history)


def break_append(bench: Bench, broken: Broken) -> Reply:
    history = History(Sampling(), [0])
    history.append = broken  # type: ignore[method-assign, assignment]
    return bench.ask(history=history)


BREAKS = [break_answer, break_send, break_question, break_sampling, break_append]


@pytest.mark.parametrize("error", [Exception, MemoryError, AssertionError, PanicException])
@pytest.mark.parametrize("break_one", BREAKS, ids=lambda each: each.__name__)
def test_a_request_that_fails_ends_alone_and_is_not_quoted(
    bench: Bench,
    caplog: pytest.LogCaptureFixture,
    break_one: Callable[[Bench, Broken], Reply],
    error: type[BaseException],
) -> None:
    other = bench.ask(max_tokens=3)
    broken = break_one(bench, Broken(error))
    got: list[Delta] = []
    while not got or got[-1].finish_reason is None:
        bench.forward.answer_next()
        delta = other.got.get(timeout=HANG_S)
        assert isinstance(delta, Delta)
        got.append(delta)
    assert len(got) == 3
    failed = broken.got.get(timeout=HANG_S)
    assert (type(failed), str(failed)) == (ParaServeError, "internal error")
    assert error.__name__ in caplog.text
    assert SECRET not in caplog.text
    bench.wait_until_free()


def test_a_reply_that_cannot_even_fail_leaves_the_others_alone(bench: Bench) -> None:
    reply = Reply()
    reply.send = reply.fail = Broken(ValueError)  # type: ignore[method-assign, assignment]
    bench.ask(reply=reply)
    after = bench.ask(max_tokens=1)
    bench.wait_until_free()
    assert isinstance(after.got.get(timeout=HANG_S), Delta)


@pytest.mark.parametrize(
    "result",
    [
        ForwardResult(token_ids=(), logprobs=()),
        ForwardResult(token_ids=(1, 1), logprobs=(0.0, 0.0)),
        ForwardResult(token_ids=(1,), logprobs=()),
    ],
)
def test_a_result_that_fits_no_batch_fails_that_pass_alone(
    bench: Bench, result: ForwardResult
) -> None:
    lost = bench.ask()
    _, future = bench.forward.passes.get(timeout=HANG_S)
    future.set_result(result)
    assert isinstance(lost.got.get(timeout=HANG_S), Unavailable)
    after = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    assert isinstance(after.got.get(timeout=HANG_S), Delta)


def test_a_pass_that_cannot_begin_fails_its_requests_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.forward, "submit", Broken(RuntimeError))
    lost = bench.ask()
    assert isinstance(lost.got.get(timeout=HANG_S), Unavailable)
    monkeypatch.undo()
    after = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    assert isinstance(after.got.get(timeout=HANG_S), Delta)


def test_a_message_that_cannot_be_answered_ends_nothing(bench: Bench) -> None:
    # `nobody` raises for the refusal that this would be answered.
    bench.loop.receive(Offer(ticket=7, num_blocks=1, reply_to="no address"))
    bench.loop.receive(Withdraw(ticket=8))
    reply = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    assert isinstance(reply.got.get(timeout=HANG_S), Delta)


def test_gauges_that_fail_end_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.gauges, "update", Broken(RuntimeError))
    reply = bench.ask(max_tokens=1)
    bench.forward.answer_next()
    assert isinstance(reply.got.get(timeout=HANG_S), Delta)


# ---- many that wait ----


def test_how_often_is_asked_grows_with_time_and_not_with_those_who_wait(bench: Bench) -> None:
    replies = [bench.ask() for _ in range(1000)]
    bench.loop_has_turned()
    joined = sum(reply.num_asks for reply in replies)
    # Those that are admitted, and one look at most: the clock of this test stands still.
    assert joined <= 4 + 64 + 16
    for _ in range(20):
        bench.clock.advance(0.1)
        bench.loop_has_turned()
    looks = sum(reply.num_asks for reply in replies) - joined
    assert 20 <= looks <= 22 * (4 + 16)


def test_a_cancelled_request_that_waits_ends_in_bounded_time(bench: Bench) -> None:
    replies = [bench.ask() for _ in range(100)]
    bench.loop_has_turned()
    cancelled = replies[73]
    cancelled.cancelled.set()
    for _ in range(100 // 16 + 1):
        bench.clock.advance(0.1)
        bench.loop_has_turned()
    assert isinstance(cancelled.got.get_nowait(), Cancelled)


def test_a_cancelled_request_is_never_computed(bench: Bench) -> None:
    running = [bench.ask(max_tokens=1) for _ in range(4)]
    waiting = bench.ask()
    bench.loop_has_turned()
    waiting.cancelled.set()
    bench.forward.answer_next()
    bench.wait_until_free()
    assert isinstance(waiting.got.get(timeout=HANG_S), Cancelled)
    assert all(isinstance(reply.got.get(timeout=HANG_S), Delta) for reply in running)
    assert bench.forward.passes.empty()


def test_one_request_too_many_is_refused_unless_another_replica_has_begun_it(bench: Bench) -> None:
    for _ in range(4 + MAX_WAITING):
        bench.ask()
    refused = bench.ask()
    assert isinstance(refused.got.get(timeout=HANG_S), ResourceExhausted)
    begun = bench.ask(tokens=[ChosenToken(token_id=1, logprob=0.0, ranking=None)])
    bench.loop_has_turned()
    assert begun.got.empty()


# ---- whether it lives ----


def test_a_probe_is_answered_by_the_loop_itself(bench: Bench) -> None:
    assert bench.probe() is None
    bench.ask()
    bench.forward.passes.get(timeout=HANG_S)
    assert bench.probe() is None


def test_a_pass_that_does_not_return_is_said_and_stops_the_pulse(
    bench: Bench, tmp_path: Path
) -> None:
    bench.ask(max_tokens=9)
    bench.forward.answer_next()
    pass_ = bench.forward.passes.get(timeout=HANG_S)
    bench.clock.advance(2.5)
    error = bench.probe()
    assert isinstance(error, Unavailable)
    assert "does not return" in str(error)
    bench.loop_has_turned()
    before = os.stat(bench.pulse_file).st_mtime_ns
    bench.clock.advance(5.0)
    assert bench.probe() is not None
    assert os.stat(bench.pulse_file).st_mtime_ns == before
    pass_[1].set_result(ForwardResult(token_ids=(1,), logprobs=(0.0,)))
    while bench.probe() is not None:
        pass
    bench.loop_has_turned()
    assert os.stat(bench.pulse_file).st_mtime_ns > before


def test_the_pulse_beats_while_there_is_nothing_to_do(bench: Bench) -> None:
    bench.loop_has_turned()
    before = os.stat(bench.pulse_file).st_mtime_ns
    bench.clock.advance(1.0)
    deadline_s = time.monotonic() + HANG_S
    while os.stat(bench.pulse_file).st_mtime_ns == before:
        assert time.monotonic() < deadline_s


def test_a_loop_that_was_closed_leaves_no_pulse(bench: Bench) -> None:
    bench.loop_has_turned()
    assert bench.pulse_file.exists()
    bench.loop.close()
    assert not bench.pulse_file.exists()


def test_whoever_waits_moves_in_steps_between_which_the_loop_goes_on(bench: Bench) -> None:
    moved: queue.SimpleQueue[str] = queue.SimpleQueue()
    replies = [Reply(moves=moved) for _ in range(100)]
    for reply in replies:
        bench.ask(reply=reply, is_resumable=True)
    bench.forward.passes.get(timeout=HANG_S)
    bench.loop.set_targets((Target(replica="d.2", address=""),))
    assert [moved.get(timeout=HANG_S) for _ in range(96)] == ["d.2"] * 96
    assert bench.probe() is None
