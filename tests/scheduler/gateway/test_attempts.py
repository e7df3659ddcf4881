"""How often one request is tried, and which request is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import ParaServeError, Unavailable
from paraserve_scheduler.gateway.attempts import (
    Attempts,
    Content,
    Deadly,
    DeadlyRequests,
)
from paraserve_scheduler.gateway.kserve.errors import (
    ReplicaFailing,
    ReplicaLate,
    ReplicaLost,
    ReplicaRefused,
    ReplicaSilent,
)
from tests.support.gateway import admitted, make_request

_ALLOWED = {ReplicaLost: 1, ReplicaFailing: 1, ReplicaRefused: 2, ReplicaSilent: 2, ReplicaLate: 1}


def content(text: str = "hi", **settings: str) -> Content:
    message = make_request(text, id=settings.pop("id", ""))
    for name, value in settings.items():
        message.parameters[name].string_param = value
    request = admitted(message)
    return Content.of(request.message, request.asked)


@pytest.mark.parametrize(("kind", "allowed"), _ALLOWED.items())
def test_a_request_is_lost_so_often_and_no_oftener(
    kind: type[ParaServeError], allowed: int
) -> None:
    attempts = Attempts("d")
    for number in range(allowed):
        attempts.failed(f"d.{number}", kind("lost"))
        assert attempts.is_resumed
    with pytest.raises(ParaServeError):
        attempts.failed("d.9", kind("lost"))
    assert attempts.is_deadly == (kind in (ReplicaLost, ReplicaFailing))


def test_other_losses_do_not_use_up_the_deaths() -> None:
    attempts = Attempts("d")
    for kind in (ReplicaRefused, ReplicaSilent, ReplicaLate, ReplicaRefused, ReplicaLost):
        attempts.failed("d.1", kind("lost"))
    with pytest.raises(Deadly) as caught:
        attempts.failed("d.2", ReplicaFailing("A pass failed."))
    assert (caught.value.http_status, caught.value.grpc_code) == (500, "INTERNAL")
    assert "retry" not in str(caught.value)


def test_who_has_seen_a_death_is_not_told_to_try_again() -> None:
    attempts = Attempts("d")
    again = Unavailable("It is not there; retry.")
    assert attempts.shown(again) is again
    attempts.failed("d.1", ReplicaLost("lost"))
    shown = attempts.shown(again)
    assert shown.grpc_code == again.grpc_code
    assert "retry" not in str(shown)


@pytest.mark.parametrize(
    "same",
    [
        {"id": "another"},
        {"seed": "5"},
        {"random_seed": "5"},
        {"sampling_parameters": '{"seed": 5}'},
        {"resume": "AAAA"},
    ],
)
def test_a_request_is_the_same_whatever_its_id_and_seed(same: dict[str, str]) -> None:
    resume = same.pop("resume", None)
    other = content(**same)
    if resume is not None:
        other.message.parameters["resume"].string_param = resume
    assert other.digest() == content().digest()


@pytest.mark.parametrize("other", [{"text": "ho"}, {"max_tokens": "5"}, {"temperature": "0.5"}])
def test_a_request_is_another_with_another_prompt_or_setting(other: dict[str, str]) -> None:
    assert content(**other).digest() != content().digest()


def test_a_prompt_counts_in_each_form() -> None:
    def raw(text: bytes) -> bytes:
        message = kserve.ModelInferRequest(model_name="tiny")
        message.inputs.add(name="text_input", datatype="BYTES", shape=[1])
        message.raw_input_contents.append(len(text).to_bytes(4, "little") + text)
        request = admitted(message)
        return Content.of(request.message, request.asked).digest()

    assert raw(b"a") == raw(b"a")
    assert raw(b"a") != raw(b"b")


def test_a_deadly_request_is_refused_for_a_minute_and_others_are_not() -> None:
    deadly = DeadlyRequests()
    deadly.add(content("bad"), 100.0)
    with pytest.raises(Deadly):
        deadly.require_harmless(content("bad", id="7"), 159.9)
    deadly.require_harmless(content("good"), 159.9)
    deadly.require_harmless(content("bad"), 160.0)


def test_deadly_requests_are_bounded() -> None:
    deadly, first = DeadlyRequests(), content("0")
    for number in range(1025):
        message = kserve.ModelInferRequest()
        message.CopyFrom(first.message)
        message.inputs[0].contents.bytes_contents[0] = str(number).encode()
        deadly.add(replace(first, message=message), 100.0)
    deadly.require_harmless(first, 101.0)
    with pytest.raises(Deadly):
        deadly.require_harmless(content("1024"), 101.0)
