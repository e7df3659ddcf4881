from __future__ import annotations

import logging

import pytest

from paraserve_backend.daemon.guard import guarded

logger = logging.getLogger("paraserve-test")


class PanicException(BaseException):
    """As a package written in Rust raises it."""


@pytest.mark.parametrize("error", [ValueError, AssertionError, MemoryError, PanicException])
def test_a_failure_is_logged_with_its_place_and_not_with_its_words(
    error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    said: list[str] = []

    def fail() -> None:
        try:
            raise KeyError("a prompt")
        except KeyError:
            raise error("an answer") from None

    with guarded(logger, "a request", lambda: said.append("internal error")):
        fail()
    assert said == ["internal error"]
    assert error.__name__ in caplog.text
    assert "test_guard.py" in caplog.text
    assert "a prompt" not in caplog.text
    assert "an answer" not in caplog.text.replace('raise error("an answer")', "")


def test_what_cannot_be_said_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise OSError

    with guarded(logger, "a request", fail):
        raise ValueError
    assert "to say so" in caplog.text


@pytest.mark.parametrize("end", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_ends_a_thread_goes_on(end: type[BaseException]) -> None:
    with pytest.raises(end), guarded(logger, "a request"):
        raise end
