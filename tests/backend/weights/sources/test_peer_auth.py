"""A question and its answer fit one peer, one path, one range, one moment, and one token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from paraserve_backend.weights.sources.peer_auth import (
    EXPIRES_HEADER,
    NONCE_HEADER,
    SIGNATURE_HEADER,
    PeerAnswer,
    PeerQuestion,
)

TOKEN, NOW_S = "token", 1000.0
ASKED = PeerQuestion.of("10.0.0.1:7", "/objects/a", (0, 8))
ANSWER = PeerAnswer(question=ASKED, version="v", size_bytes=9, digest="1")


def test_a_question_is_known_and_tells_no_token() -> None:
    headers = ASKED.headers(TOKEN, NOW_S)
    assert TOKEN not in "".join(headers.values())
    assert headers[NONCE_HEADER] == ASKED.nonce
    assert ASKED.is_signed(headers, TOKEN, NOW_S)
    assert ASKED.is_signed(headers, TOKEN, NOW_S - 200)  # of a clock that is behind


@pytest.mark.parametrize(
    "asked",
    [
        replace(ASKED, host="10.0.0.2:7"),
        replace(ASKED, path="/objects/b"),
        replace(ASKED, byte_range=(0, 9)),
        replace(ASKED, byte_range=None),
        replace(ASKED, nonce="another"),
        # What is said twice is not the same as something longer said once.
        replace(ASKED, host="10.0.0.1", path=":7/objects/a"),
    ],
)
def test_a_signature_cannot_be_used_for_another_question(asked: PeerQuestion) -> None:
    assert not asked.is_signed(ASKED.headers(TOKEN, NOW_S), TOKEN, NOW_S)


@pytest.mark.parametrize("now_s", [NOW_S + 1e6, NOW_S - 1e6])
def test_a_signature_is_of_now(now_s: float) -> None:
    assert not ASKED.is_signed(ASKED.headers(TOKEN, NOW_S), TOKEN, now_s)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {EXPIRES_HEADER: "1100"},
        {EXPIRES_HEADER: "x", SIGNATURE_HEADER: "ä"},
        {EXPIRES_HEADER: "١١٠٠", SIGNATURE_HEADER: "0" * 64},
        {EXPIRES_HEADER: "9" * 5000, SIGNATURE_HEADER: "0" * 64},
        {EXPIRES_HEADER: "-1", SIGNATURE_HEADER: "\udcff"},
    ],
)
def test_no_other_headers_are_a_signature(headers: dict[str, str]) -> None:
    assert not ASKED.is_signed(headers, TOKEN, NOW_S)


def test_another_token_signs_nothing_and_proves_nothing() -> None:
    assert not ASKED.is_signed(ASKED.headers("other", NOW_S), TOKEN, NOW_S)
    assert not ASKED.is_signed(ASKED.headers(None, NOW_S), TOKEN, NOW_S)
    assert not ANSWER.is_proved(ANSWER.proof("other"), TOKEN)
    assert not ANSWER.is_proved(ANSWER.proof(None), TOKEN)
    # A question's own signature is no proof of an answer: nobody can send it back.
    assert not ANSWER.is_proved(ASKED.headers(TOKEN, NOW_S)[SIGNATURE_HEADER], TOKEN)


@pytest.mark.parametrize(
    "change",
    [
        lambda it: replace(it, version="w"),
        lambda it: replace(it, size_bytes=8),
        lambda it: replace(it, digest="2"),
        lambda it: replace(it, question=replace(it.question, nonce="another")),
        lambda it: replace(it, question=replace(it.question, path="/objects/b")),
        lambda it: replace(it, question=replace(it.question, byte_range=(0, 9))),
        lambda it: replace(it, question=replace(it.question, host="10.0.0.2:7")),
    ],
)
def test_a_proof_is_of_one_answer(change: Callable[[PeerAnswer], PeerAnswer]) -> None:
    assert ANSWER.is_proved(ANSWER.proof(TOKEN), TOKEN)
    assert not change(ANSWER).is_proved(ANSWER.proof(TOKEN), TOKEN)


def test_without_a_token_everybody_is_a_member() -> None:
    assert ASKED.is_signed({}, None, NOW_S)
    assert ANSWER.is_proved("", None)
