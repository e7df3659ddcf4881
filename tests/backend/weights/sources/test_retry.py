from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paraserve_backend.errors import (
    Cancelled,
    NotFound,
    ParaServeError,
    SourceUnavailable,
)
from paraserve_backend.weights.sources.base import BrokenTransfer, StoredObject
from paraserve_backend.weights.sources.retry import Retrier, RetryPolicy

CONTENT = bytes(range(200))
STORED = StoredObject(key="weights.bin", size_bytes=len(CONTENT), version="1")


class BreakingConnection:
    """Breaks after each of `breaks` bytes in turn, or raises the error that stands there."""

    def __init__(self, *breaks: int | ParaServeError) -> None:
        self._breaks = list(breaks)
        self.served_bytes = 0

    def read_into(self, stored: StoredObject, start: int, view: memoryview) -> None:
        limit = self._breaks.pop(0) if self._breaks else len(view)
        if isinstance(limit, ParaServeError):
            raise limit
        count = min(limit, len(view))
        view[:count] = CONTENT[start : start + count]
        self.served_bytes += count
        if count < len(view):
            raise BrokenTransfer("reset by peer", landed_bytes=count)

    def abort(self) -> None: ...

    def close(self) -> None: ...


class Pauses:
    """Notes how long it was to wait, and waits not at all."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def read(connection: BreakingConnection, pauses: Pauses, attempts: int = 6) -> tuple[bytes, int]:
    buffer = bytearray(len(CONTENT))
    retrier = Retrier(pause=pauses, policy=RetryPolicy(attempts=attempts), rng=random.Random(1))
    retries = retrier.read(connection, STORED, 0, memoryview(buffer))
    return bytes(buffer), retries


@given(st.lists(st.integers(0, 100), max_size=5))
def test_a_broken_read_goes_on_at_the_byte_where_it_broke(breaks: list[int]) -> None:
    connection = BreakingConnection(*breaks)
    content, retries = read(connection, pauses := Pauses())
    assert content == CONTENT
    assert connection.served_bytes == len(CONTENT)
    assert retries == len(pauses.seconds) <= len(breaks)


def test_attempts_are_bounded_and_pauses_double_up_to_their_limit() -> None:
    pauses = Pauses()
    with pytest.raises(SourceUnavailable, match=r"weights\.bin after 9 attempts: reset by peer"):
        read(BreakingConnection(*[0] * 9), pauses, attempts=9)
    assert len(pauses.seconds) == 8
    for number, seconds in enumerate(pauses.seconds):
        full_s = min(2.0, 0.1 * 2**number)
        assert full_s / 2 <= seconds <= full_s


def test_an_error_that_will_not_pass_is_raised_at_once() -> None:
    pauses = Pauses()
    with pytest.raises(NotFound, match="gone"):
        read(BreakingConnection(10, NotFound("gone")), pauses)
    assert len(pauses.seconds) == 1


def test_a_pause_may_end_the_retries() -> None:
    def refuse(seconds: float) -> None:
        raise Cancelled("enough")

    retrier = Retrier(pause=refuse, rng=random.Random(1))
    with pytest.raises(Cancelled, match="enough"):
        retrier.read(BreakingConnection(1), STORED, 0, memoryview(bytearray(9)))
