"""The generate loop when things go wrong, with a forward pass the test controls."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from paraserve_backend.engines.base import LoopState
from paraserve_backend.engines.native.batcher import (
    Batcher,
    BatchingLimits,
    BlockPool,
    ScheduledBatch,
)
from paraserve_backend.engines.native.handover_source import HandOverSource
from paraserve_backend.engines.native.handover_target import HandOverTarget
from paraserve_backend.engines.native.loop import GenerateLoop, Request
from paraserve_backend.errors import (
    Cancelled,
    DeadlineExceeded,
    ParaServeError,
    Unavailable,
)
from paraserve_backend.generation.answer import Answer, Delta
from paraserve_backend.generation.sequence import TokenSequence
from paraserve_backend.generation.text import Detokenizer, StopWords
from paraserve_backend.protocol.forward import ForwardResult
from paraserve_backend.protocol.hand_over import Message
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.protocol.sampling import Sampling
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


@dataclass(slots=True, eq=False)
class Reply:
    got: queue.SimpleQueue[Delta | ParaServeError] = field(default_factory=queue.SimpleQueue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def send(self, delta: Delta) -> None:
        self.got.put(delta)

    def fail(self, error: ParaServeError) -> None:
        self.got.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        raise AssertionError("no request of these tests may move")

    def is_cancelled(self) -> bool:
        return self.cancelled.is_set()


class NoGauges:
    def update(self, state: LoopState) -> None:
        pass


def nobody(_address: str, _message: Message) -> None:
    raise AssertionError("no message is due")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    loop: GenerateLoop
    forward: HeldForward
    batcher: Batcher

    def ask(self, max_tokens: int = 3) -> Reply:
        reply = Reply()
        answer = Answer(
            detokenizer=Detokenizer(WORDS, [0]),
            stop_words=StopWords(()),
            is_stream=True,
            prefix="",
            num_input_tokens=1,
        )
        sequence = TokenSequence(prompt_ids=[0], sampling=Sampling(), max_tokens=max_tokens)
        self.loop.add(Request(sequence=sequence, answer=answer, reply=reply))
        return reply


@pytest.fixture
def bench() -> Iterator[Bench]:
    limits = BatchingLimits(max_sequences=4, max_batch_tokens=8, batches_in_flight=1, block_size=4)
    batcher, forward = Batcher(limits, BlockPool(8)), HeldForward()
    handover_source = HandOverSource(
        nobody, inbox="", block_size=4, block_bytes=1, num_layers=1, now_s=time.monotonic
    )
    handover_target = HandOverTarget(batcher.pool, None, nobody, time.monotonic)
    loop = GenerateLoop(
        batcher,
        forward,
        NoGauges(),
        1,
        handover_source=handover_source,
        handover_target=handover_target,
    )
    yield Bench(loop=loop, forward=forward, batcher=batcher)
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
