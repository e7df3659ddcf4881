"""Requests are read in their order, beside the thread that brings them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator

import pytest

from paraserve_backend.engines.base import MAX_WAITING
from paraserve_backend.errors import (
    Cancelled,
    InvalidRequest,
    ParaServeError,
    ResourceExhausted,
    Unavailable,
)
from paraserve_backend.generation.answer import Delta
from paraserve_backend.protocol.resume import Resume
from paraserve_backend.roles.intake import Intake
from tests.support.limits import HANG_S


class Reply:
    def __init__(self, *, is_cancelled: bool = False) -> None:
        self.got: queue.SimpleQueue[ParaServeError] = queue.SimpleQueue()
        self._is_cancelled = is_cancelled

    def send(self, delta: Delta) -> None:
        raise AssertionError("the intake sends nothing")

    def fail(self, error: ParaServeError) -> None:
        self.got.put(error)

    def move(self, replica: str, resume: Resume) -> None:
        raise AssertionError("the intake moves nothing")

    def is_cancelled(self) -> bool:
        return self._is_cancelled

    def error(self) -> ParaServeError:
        return self.got.get(timeout=HANG_S)


@pytest.fixture
def intake() -> Iterator[Intake]:
    intake = Intake()
    yield intake
    intake.close()


class Gate:
    """Work that waits until it may go on."""

    def __init__(self) -> None:
        self._begun, self._may_end = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self._begun.set()
        assert self._may_end.wait(HANG_S)

    def wait(self) -> None:
        assert self._begun.wait(HANG_S)

    def open(self) -> None:
        self._may_end.set()


def test_requests_are_taken_in_in_their_order_while_the_caller_goes_on(intake: Intake) -> None:
    gate = Gate()
    taken: queue.SimpleQueue[int] = queue.SimpleQueue()
    intake.put(Reply(), gate, is_begun=False)
    for number in range(100):
        intake.put(Reply(), lambda number=number: taken.put(number), is_begun=False)  # type: ignore[misc]
    gate.open()
    assert [taken.get(timeout=HANG_S) for _ in range(100)] == list(range(100))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (InvalidRequest("The prompt is too long."), "The prompt is too long."),
        (ValueError("a prompt"), "internal error"),
        (MemoryError("a prompt"), "internal error"),
    ],
)
def test_what_fails_of_one_is_its_own_answer_and_the_next_is_taken_in(
    intake: Intake, error: Exception, expected: str
) -> None:
    def fail() -> None:
        raise error

    reply, after = Reply(), threading.Event()
    intake.put(reply, fail, is_begun=False)
    intake.put(Reply(), after.set, is_begun=False)
    assert str(reply.error()) == expected
    assert after.wait(HANG_S)


def test_one_that_was_cancelled_while_it_waited_is_not_read(intake: Intake) -> None:
    reply = Reply(is_cancelled=True)
    intake.put(reply, lambda: pytest.fail("it was read"), is_begun=False)
    assert isinstance(reply.error(), Cancelled)


def test_so_many_may_wait_and_those_that_another_replica_began_always(intake: Intake) -> None:
    gate = Gate()
    intake.put(Reply(), gate, is_begun=False)
    gate.wait()
    for _ in range(MAX_WAITING):
        intake.put(Reply(), lambda: None, is_begun=False)
    with pytest.raises(ResourceExhausted, match="wait to be read already"):
        intake.put(Reply(), lambda: None, is_begun=False)
    intake.put(Reply(), lambda: None, is_begun=True)
    gate.open()


def test_who_waits_when_the_model_goes_is_told(intake: Intake) -> None:
    gate, waiting = Gate(), Reply()
    intake.put(Reply(), gate, is_begun=False)
    gate.wait()
    intake.put(waiting, lambda: None, is_begun=False)
    closing = threading.Thread(target=intake.close)
    closing.start()
    while not intake._is_closing.is_set():
        pass
    gate.open()
    closing.join()
    assert isinstance(waiting.error(), Unavailable)
