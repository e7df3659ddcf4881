"""One replica in a real tritonserver, asked without a gateway: what it guards and tells."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tritonclient.grpc as triton

from integration.support.single_models import (
    FRESH,
    MAX_TOKENS,
    Asked,
    add_model,
    hand_over,
    load,
    run_dir,
    tell,
    unload,
)
from integration.support.tiny_cluster import wait_until
from integration.support.triton_server import TritonServer
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from tests.support.models import TinyModel, write_model, write_words

MODEL = "alone"
PROMPT = [5, 17, 42]
#: A request that ends with this number of tokens meets a bug when its third one is delivered.
BROKEN_MAX_TOKENS = 377
PROBE: dict[str, str | int | bool] = {"paraserve_probe": True, "paraserve_replica": "standalone"}
UNBIND = json.dumps({"unbind": True})
HAND_OVER = json.dumps({"hand_over": [{"replica": "elsewhere", "address": ""}]})

#: Our backend, with a bug in what it makes of one request's tokens.
BROKEN_BACKEND = f"""
from paraserve_backend.generation.answer import Answer
from paraserve_backend.generation.encoder import RequestEncoder
from paraserve_backend.tritonserver.stub.model import TritonPythonModel

make = RequestEncoder.answer

def answer(self, request, prompt_ids):
    made = make(self, request, prompt_ids)
    if request.max_tokens == {BROKEN_MAX_TOKENS}:
        add = made.add
        def broken(token, reason, seen=[]):
            seen.append(token)
            if len(seen) == 3:
                raise Exception("Expected prefix: 'words of the answer'")
            return add(token, reason)
        made.add = broken
    return made

RequestEncoder.answer = answer
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    checkpoint = tmp_path_factory.mktemp("checkpoint")
    model = write_model(checkpoint, "llama", seed=4)
    write_words(checkpoint)
    return model


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, model: TinyModel) -> Iterator[TritonServer]:
    with TritonServer(tmp_path_factory.mktemp("triton")) as server:
        server.add_backend("broken", BROKEN_BACKEND)
        add_model(server, MODEL, "broken", model.folder, {})
        load(server, MODEL)
        yield server
        unload(server)


def process(server: TritonServer) -> int:
    (stub,) = ProcessTable(server.model_repository).find()
    return stub.pid


def test_a_request_that_meets_a_bug_ends_alone(server: TritonServer, model: TinyModel) -> None:
    before = process(server)
    bystander = Asked(server, MODEL, PROMPT, FRESH)
    got = bystander.take(3)
    broken = Asked(server, MODEL, PROMPT, FRESH, max_tokens=BROKEN_MAX_TOKENS)
    assert broken.take(2) == got[:2]
    with pytest.raises(triton.InferenceServerException, match=r"INTERNAL: internal error"):
        broken.next()
    broken.close()
    more, _ = bystander.rest()
    assert got + more == model.greedy(PROMPT, MAX_TOKENS)
    assert process(server) == before
    assert "a request failed: Exception" in server.log
    assert "words of the answer'\")" in server.log  # the line of code
    assert "Exception: Expected" not in server.log


@pytest.mark.parametrize(
    ("command", "secret"), [(UNBIND, None), (HAND_OVER, ""), (HAND_OVER, "5e" * 32)]
)
def test_a_command_without_the_secret_is_refused(
    server: TritonServer, command: str, secret: str | None
) -> None:
    parameters: dict[str, str | int | bool] = {"command": command}
    if secret is not None:
        parameters["paraserve_secret"] = secret
    with pytest.raises(
        triton.InferenceServerException, match="INVALID_ARGUMENT: Parameter 'command' is not for"
    ):
        tell(server, MODEL, parameters)
    # With tensors it is refused as well, and by its name.
    asked = Asked(server, MODEL, PROMPT, FRESH, **parameters)  # type: ignore[arg-type]
    with pytest.raises(triton.InferenceServerException, match="'command' is not for clients"):
        asked.next()
    asked.close()


def test_a_command_with_the_secret_is_obeyed(server: TritonServer) -> None:
    # It stands alone: it says why it keeps its requests, as nobody without the secret is told.
    with pytest.raises(triton.InferenceServerException, match="keeps its requests"):
        hand_over(server, MODEL, "elsewhere")


def test_a_long_prompt_is_refused_in_no_time_and_the_others_go_on(
    server: TritonServer, model: TinyModel
) -> None:
    bystander = Asked(server, MODEL, PROMPT, FRESH)
    got = bystander.take(1)
    ids = Asked(server, MODEL, [5] * 1_000_000, FRESH)
    with pytest.raises(triton.InferenceServerException, match="The prompt has 1000000 tokens"):
        ids.next()
    ids.close()
    more, _ = bystander.rest()
    assert got + more == model.greedy(PROMPT, MAX_TOKENS)


def test_a_probe_is_answered_unless_the_process_is_stopped(server: TritonServer) -> None:
    tell(server, MODEL, PROBE)
    pulse = run_dir(server).pulse_file(MODEL)
    before = os.stat(pulse).st_mtime_ns
    wait_until(lambda: os.stat(pulse).st_mtime_ns > before)
    answered: list[Exception | None] = []
    client = triton.InferenceServerClient(server.grpc_address)
    client.start_stream(lambda result, error: answered.append(error))
    pid = process(server)
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T")
        stopped_at = os.stat(pulse).st_mtime_ns
        client.async_stream_infer(MODEL, [], parameters=PROBE, enable_empty_final_response=True)
        other = triton.InferenceServerClient(server.grpc_address)
        assert other.is_server_live()  # the server answers for itself, the process does not
        other.close()
        assert answered == []
        assert os.stat(pulse).st_mtime_ns == stopped_at
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: bool(answered))
    client.stop_stream()
    client.close()
    assert answered == [None]
    wait_until(lambda: os.stat(pulse).st_mtime_ns > stopped_at)
