"""A light client: many requests on few connections, counted and timed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from paraserve_backend.rpc.channels import triton_channel

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceAsyncStub

_CHANNELS = 4


def request(deployment: str, *, tokens: int, is_stream: bool = False) -> kserve.ModelInferRequest:
    message = kserve.ModelInferRequest(model_name=deployment)
    prompt = message.inputs.add(name="input_ids", datatype="INT32", shape=[4])
    prompt.contents.int_contents.extend((11, 12, 13, 14))
    stream = message.inputs.add(name="stream", datatype="BOOL", shape=[1])
    stream.contents.bool_contents.append(is_stream)
    message.parameters["max_tokens"].int64_param = tokens
    message.parameters["ignore_eos"].bool_param = True
    return message


async def only(message: kserve.ModelInferRequest) -> AsyncIterator[kserve.ModelInferRequest]:
    yield message


@dataclass(slots=True, kw_only=True)
class Outcomes:
    """What has come of requests so far."""

    sent: int = 0
    answered: int = 0
    tokens: int = 0
    #: How long each refusal took.
    refused_s: list[float] = field(default_factory=list)
    #: Other errors, as their clients were told.
    failed: list[str] = field(default_factory=list)

    @property
    def open(self) -> int:
        return self.sent - self.answered - len(self.refused_s) - len(self.failed)


class Crowd:
    """Sends requests for one deployment through a gateway."""

    def __init__(
        self, stubs: list[GRPCInferenceServiceAsyncStub], deployment: str, tokens: int
    ) -> None:
        self.outcomes = Outcomes()
        self._stubs = stubs
        self._tokens = tokens
        self._message = request(deployment, tokens=tokens)
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            task = asyncio.create_task(self._ask())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def keep_open(self, count: int, until_s: float) -> None:
        """Have so many requests under way until a moment: the next when one has ended."""

        async def one_after_the_other() -> None:
            while time.monotonic() < until_s:
                await self._ask()

        await asyncio.gather(*(one_after_the_other() for _ in range(count)))

    async def at_rate(self, per_s: float, until_s: float) -> None:
        """Send so many each second until a moment, whatever comes of them."""
        start_s, sent = time.monotonic(), 0
        while (now_s := time.monotonic()) < until_s:
            due = int((now_s - start_s) * per_s) - sent
            self.send(due)
            sent += due
            await asyncio.sleep(0.005)

    async def ended(self) -> None:
        await asyncio.gather(*self._tasks)

    async def leave(self) -> None:
        """Cancel what is under way."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _ask(self) -> None:
        outcomes, start_s = self.outcomes, time.monotonic()
        stub = self._stubs[outcomes.sent % len(self._stubs)]
        outcomes.sent += 1
        try:
            await stub.ModelInfer(self._message)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcomes.refused_s.append(time.monotonic() - start_s)
            else:
                outcomes.failed.append(f"{error.code().name}: {error.details()}")
            return
        outcomes.answered += 1
        outcomes.tokens += self._tokens


@contextlib.asynccontextmanager
async def crowd(address: str, deployment: str, *, tokens: int) -> AsyncIterator[Crowd]:
    """Make a crowd, which leaves at the end of the body."""
    async with contextlib.AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(triton_channel(address)) for _ in range(_CHANNELS)
        ]
        them = Crowd([GRPCInferenceServiceStub(each) for each in channels], deployment, tokens)
        stack.push_async_callback(them.leave)
        yield them
