"""Two replicas on real tritonservers, one of which is stopped: all answers are right."""

from __future__ import annotations

import asyncio
import os
import signal
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tritonclient.grpc import service_pb2 as kserve

from integration.support.single_models import add_model, kill, load, unload
from integration.support.triton_server import TritonServer
from paraserve_backend.tritonserver.host.stubs import ProcessTable
from tests.support.gateway import DEPLOYMENT, GatewayHarness, serving
from tests.support.models import TinyModel, write_model, write_words

_TOKENS = 60
_STREAMS = 4
_PROMPTS = [[5, 6, 7 + number] for number in range(_STREAMS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    folder = tmp_path_factory.mktemp("checkpoint")
    model = write_model(folder, "llama", seed=4)
    write_words(folder)
    return model


@pytest.fixture
def servers(tmp_path: Path, model: TinyModel) -> Iterator[list[TritonServer]]:
    """Two servers, with replica 1 and replica 2."""
    with TritonServer(tmp_path / "1") as first, TritonServer(tmp_path / "2") as second:
        servers = [first, second]
        for number, server in enumerate(servers, start=1):
            name = f"{DEPLOYMENT}.{number}"
            add_model(server, name, "paraserve", model.folder, {"max_sequences": str(_STREAMS)})
            load(server, name)
        yield servers
        unload(servers[1])


@contextmanager
def stopped(server: TritonServer) -> Iterator[None]:
    """Stop a server's one model process; it does not go on.

    Triton may abort where such a process goes on: what comes then is no longer about silence.
    """
    (stub,) = ProcessTable(server.model_repository).find()
    os.kill(stub.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        kill(server)


def ask(prompt: list[int], *, is_stream: bool) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name=DEPLOYMENT)
    ids = request.inputs.add(name="input_ids", datatype="INT32", shape=[len(prompt)])
    ids.contents.int_contents.extend(prompt)
    stream = request.inputs.add(name="stream", datatype="BOOL", shape=[1])
    stream.contents.bool_contents.append(is_stream)
    request.parameters["max_tokens"].int64_param = _TOKENS
    request.parameters["ignore_eos"].bool_param = True
    return request


def ids_of(response: kserve.ModelInferResponse) -> list[int]:
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        if output.name == "output_ids":
            return [token_id for (token_id,) in struct.iter_unpack("<i", raw)]
    return []


async def streamed(
    gateway: GatewayHarness, prompt: list[int], begun: asyncio.Event | None = None
) -> list[int]:
    async def only() -> AsyncIterator[kserve.ModelInferRequest]:
        yield ask(prompt, is_stream=True)

    ids: list[int] = []
    async for entry in gateway.stub.ModelStreamInfer(only()):
        assert not entry.error_message
        ids += ids_of(entry.infer_response)
        if begun is not None and len(ids) >= 3:
            begun.set()
    return ids


async def whole(gateway: GatewayHarness, prompt: list[int]) -> list[int]:
    return ids_of(await gateway.stub.ModelInfer(ask(prompt, is_stream=False)))


async def test_one_stopped_replica_beside_a_good_one_costs_no_request(
    servers: list[TritonServer], model: TinyModel
) -> None:
    torch.set_num_threads(1)
    expected = [model.greedy(prompt, _TOKENS) for prompt in _PROMPTS]
    async with serving(replicas=0) as gateway:
        await gateway.publish(
            *(
                gateway.endpoint(number, address=server.grpc_address)
                for number, server in enumerate(servers, start=1)
            )
        )
        begun = [asyncio.Event() for _ in _PROMPTS]
        running = [
            asyncio.create_task(streamed(gateway, prompt, each))
            for prompt, each in zip(_PROMPTS, begun, strict=True)
        ]
        for each in begun:
            await each.wait()
        with stopped(servers[0]):
            unstreamed = asyncio.gather(*(whole(gateway, prompt) for prompt in _PROMPTS))
            assert await asyncio.gather(*running) == expected
            assert await unstreamed == expected
            # And those that come while it is known to say nothing.
            assert await whole(gateway, _PROMPTS[0]) == expected[0]
