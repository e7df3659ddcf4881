"""What Triton calls answers every request, and never raises, whatever comes and whatever fails."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from paraserve_backend.engines.base import AnswerProbe, Reply
from paraserve_backend.errors import InvalidRequest, ParaServeError, Unavailable
from paraserve_backend.protocol.hand_over import Target
from paraserve_backend.protocol.names import SlotKind
from paraserve_backend.protocol.parameters import SlotConfig
from paraserve_backend.protocol.request import GenerateRequest
from paraserve_backend.protocol.resume import Resume
from tests.support.fake_triton import FakeRequest, FakeResponse, FakeSender, make_module, words
from tests.support.limits import HANG_S

STUB = "paraserve_backend.tritonserver.stub"
FINAL = 1


@pytest.fixture(scope="module")
def generate() -> Iterator[ModuleType]:
    """The module under test, with a Triton that is none; nobody else sees it."""
    patch = pytest.MonkeyPatch()
    patch.setitem(sys.modules, "triton_python_backend_utils", make_module())
    for name in ("generate", "responses", "requests", "metrics", "pipeline"):
        patch.delitem(sys.modules, f"{STUB}.{name}", raising=False)
    yield importlib.import_module(f"{STUB}.generate")
    for name in ("generate", "responses", "requests", "metrics", "pipeline"):
        sys.modules.pop(f"{STUB}.{name}", None)
    patch.undo()


class Role:
    """Takes what it is given; raises what a test tells it to."""

    max_context = 100

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.added: list[GenerateRequest] = []
        self.targets: tuple[Target, ...] = ()
        self.hangs = False

    def add(self, request: GenerateRequest, reply: Reply, resume: Resume | None) -> None:
        if self.error is not None:
            raise self.error
        self.added.append(request)
        reply.fail(Unavailable("It has been added."))

    def hand_over(self, targets: tuple[Target, ...]) -> None:
        self.targets = targets

    def probe(self, answer: AnswerProbe) -> None:
        answer(Unavailable("A pass does not return.") if self.hangs else None)

    def close(self) -> None:
        pass


class Bench:
    def __init__(self, generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        self.role = Role()
        monkeypatch.setattr(generate, "_generate_role", lambda *_: self.role)
        authority = generate.Authority(b"secret")
        self.adapter = generate.GenerateAdapter(None, authority, None)

    def said(self, request: FakeRequest) -> tuple[FakeResponse | None, int]:
        assert self.adapter.execute([request]) is None
        return request.sender.sent.get(timeout=HANG_S)

    def error(self, request: FakeRequest) -> str:
        response, flags = self.said(request)
        assert response is not None
        assert flags == FINAL
        return str(response.said)


@pytest.fixture
def bench(generate: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    bench = Bench(generate, monkeypatch)
    yield bench
    bench.adapter.close()


TEXT = {"text_input": words(b"a prompt")}


class PanicException(BaseException):
    """As a package written in Rust raises it."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InvalidRequest("The prompt is too long."), "INVALID_ARGUMENT: The prompt is too long."),
        (ParaServeError("internal error"), "INTERNAL: internal error"),
        (ValueError("a prompt"), "INTERNAL: internal error"),
        (RecursionError("a prompt"), "INTERNAL: internal error"),
        (PanicException("a prompt"), "INTERNAL: internal error"),
    ],
)
def test_what_fails_of_a_request_is_its_answer(
    bench: Bench, error: BaseException, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench.role.error = error
    assert bench.error(FakeRequest(TEXT)) == said
    assert "a prompt" not in caplog.text
    bench.role.error = None
    assert bench.error(FakeRequest(TEXT)) == "UNAVAILABLE: It has been added."


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"input_ids": np.zeros(10**7, np.int32)}, "The prompt has 10000000 tokens; the context"),
        ({"stop_words": np.full(10**6, b"", np.object_)}, "'stop_words' has 1000000 elements"),
        ({"seed": np.zeros((1 << 20, 2), np.uint64)}, "'seed' has 2097152 elements"),
    ],
)
def test_a_huge_tensor_is_refused_before_it_is_converted(
    bench: Bench, inputs: dict[str, Any], said: str
) -> None:
    assert said in bench.error(FakeRequest(inputs))


@pytest.mark.parametrize(
    "parameters",
    [
        {"command": "{}"},
        {"command": "{}", "paraserve_secret": "wrong"},
        {"paraserve_other": 1},
        {"paraserve_secret": "secret"},
        {"resume": 5},
        {"resume": "x" * 1000},
        {"resume": True},
    ],
)
@pytest.mark.parametrize("inputs", [{}, TEXT])
def test_what_is_not_for_clients_is_refused(
    bench: Bench, inputs: dict[str, Any], parameters: dict[str, object]
) -> None:
    assert bench.error(FakeRequest(inputs, parameters)).startswith("INVALID_ARGUMENT: ")
    assert bench.role.targets == ()


def test_a_command_of_the_agent_is_obeyed(bench: Bench) -> None:
    command = '{"hand_over": [{"replica": "d.2", "address": ""}]}'
    request = FakeRequest({}, {"command": command, "paraserve_secret": "secret"})
    assert bench.said(request) == (None, FINAL)
    assert bench.role.targets == (Target(replica="d.2", address=""),)


def test_a_probe_is_answered_with_nothing_or_with_why_not(bench: Bench) -> None:
    parameters = {"paraserve_probe": True, "paraserve_replica": "d.1"}
    assert bench.said(FakeRequest({}, parameters)) == (None, FINAL)
    bench.role.hangs = True
    assert bench.error(FakeRequest({}, parameters)) == "UNAVAILABLE: A pass does not return."


def test_a_request_that_cannot_be_answered_leaves_the_next_one(bench: Bench) -> None:
    class Deaf(FakeSender):
        def send(self, response: FakeResponse | None = None, flags: int = 0) -> None:
            raise RuntimeError("Failed to send")

    after = FakeRequest(TEXT)
    broken = [FakeRequest({}, {"command": "{}"}, Deaf()), FakeRequest(TEXT, {}, Deaf()), after]
    assert bench.adapter.execute(broken) is None
    assert after.sender.sent.get(timeout=HANG_S)[1] == FINAL


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (
            "in ensemble 'd.1.forward', UNAVAILABLE: The pipeline lost the connection to a stage.",
            "The pipeline lost the connection to a stage.",
        ),
        (
            "in ensemble 'd.1.forward', DEADLINE_EXCEEDED: The pipeline gave no answer.",
            "The pipeline gave no answer.",
        ),
        ("NOT_FOUND: Replica d.1 is not here.", "Replica d.1 is not here."),
        (
            "in ensemble 'd.1.forward', Stub process 'd.1.stage0' is not healthy.",
            "A part of the pipeline does not answer; send the request again.",
        ),
    ],
)
def test_a_failed_pass_is_a_loss_and_names_no_inner_model(
    generate: ModuleType, message: str, said: str
) -> None:
    error = generate._failed_pass(message)
    assert (error.grpc_code, str(error)) == ("UNAVAILABLE", said)


# ---- slots and links ----


@pytest.fixture
def slot(generate: ModuleType) -> Iterator[Any]:
    """An idle slot for links, which may become what answers nothing."""
    module = importlib.import_module(f"{STUB}.slot")
    config = SlotConfig(kind=SlotKind.LINK, device="cpu", run_dir=Path("/dev/shm/run"))
    slot = module.SlotAdapter(config, lambda _: None, generate.Authority(b"secret"))
    yield slot
    slot.close()
    sys.modules.pop(f"{STUB}.slot", None)


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({}, "NOT_FOUND: Replica (none named) is not here."),
        ({"paraserve_replica": "d.1"}, "NOT_FOUND: Replica d.1 is not here."),
        ({"paraserve_replica": "d.1", "paraserve_probe": True}, "NOT_FOUND: Replica d.1 is not"),
        ({"command": '{"unbind": true}'}, "INVALID_ARGUMENT: Parameter 'command' is not for"),
        (
            {"command": '{"bind": {}}', "paraserve_secret": "other"},
            "INVALID_ARGUMENT: Parameter 'command' is not for",
        ),
        (
            {"command": '{"bind": {}}', "paraserve_secret": "secret"},
            "INVALID_ARGUMENT: Parameter 'role' is missing",
        ),
    ],
)
def test_an_idle_slot_says_why_it_does_nothing(
    slot: Any, parameters: dict[str, object], said: str
) -> None:
    request = FakeRequest({}, parameters)
    assert slot.execute([request]) is None
    response, _ = request.sender.sent.get(timeout=HANG_S)
    assert response is not None
    assert str(response.said).startswith(said)


def test_a_slot_lets_go_for_its_agent(slot: Any) -> None:
    request = FakeRequest({}, {"command": '{"unbind": true}', "paraserve_secret": "secret"})
    assert slot.execute([request]) is None
    response, flags = request.sender.sent.get(timeout=HANG_S)
    assert response is not None
    assert (response.said, flags) == (None, FINAL)


def test_a_link_answers_a_request_that_is_no_pass(
    generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = importlib.import_module(f"{STUB}.pipeline")
    link = pipeline.LinkAdapter.__new__(pipeline.LinkAdapter)
    requests = [FakeRequest({}), FakeRequest({"batch": np.zeros(1, np.uint8)})]
    assert link.execute(requests) is None
    for request in requests:
        response, flags = request.sender.sent.get(timeout=HANG_S)
        assert response is not None
        assert "A forward pass has an input" in str(response.said)
        assert flags == FINAL
