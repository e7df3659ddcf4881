from __future__ import annotations

import logging
from typing import Any, NoReturn

import grpc
import grpc.aio
import pytest

from paraserve_backend.errors import NotFound
from paraserve_backend.rpc.errors import errors_to, is_connection_lost, sentence

_UNAVAILABLE, _UNKNOWN = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN


class Aborted(Exception):
    pass


class FakeContext:
    def __init__(self) -> None:
        self.answers: list[tuple[grpc.StatusCode, str]] = []

    async def abort(self, code: grpc.StatusCode, text: str) -> NoReturn:
        self.answers.append((code, text))
        raise Aborted


async def answer_to(error: Exception) -> tuple[grpc.StatusCode, str]:
    context: Any = FakeContext()
    with pytest.raises(Aborted):
        async with errors_to(context):
            raise error
    (answer,) = context.answers
    return answer  # type: ignore[no-any-return]  # the context is any


async def test_an_error_of_ours_ends_the_call_with_its_code_and_sentence() -> None:
    assert await answer_to(NotFound("no x")) == (grpc.StatusCode.NOT_FOUND, "no x")


async def test_a_bug_is_only_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        code, text = await answer_to(ValueError("/srv/secret"))
    assert (code, "secret" in text) == (grpc.StatusCode.INTERNAL, False)
    assert "/srv/secret" in caplog.text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a → b", "a → b"),
        ("\x1b[2J\n", "\\x1b[2J\\n"),
        ("\ud800", "\\ud800"),
        ("x" * 1001, "x" * 997 + "..."),
    ],
)
def test_a_text_is_one_line_of_bounded_length(text: str, shown: str) -> None:
    assert sentence(text) == shown


@pytest.mark.parametrize(
    ("code", "details", "is_lost"),
    [
        (_UNAVAILABLE, "failed to connect to all addresses", True),
        (_UNAVAILABLE, None, True),
        (_UNKNOWN, "Stream removed (Socket closed)", True),
        (_UNKNOWN, "Unexpected <class 'ValueError'>: boom", False),
        (_UNKNOWN, None, False),
        (grpc.StatusCode.INTERNAL, "Stream removed", False),
    ],
)
def test_a_lost_connection_is_told_from_a_call_that_failed(
    code: grpc.StatusCode, details: str | None, is_lost: bool
) -> None:
    metadata = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(code, metadata, metadata, details, None)
    assert is_connection_lost(error) is is_lost
