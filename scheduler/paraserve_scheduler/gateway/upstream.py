"""Sends one request to one replica: a gRPC stream of its own to the replica's Triton server.

The stream is bounded in time and cancelled with its caller. Which failures mean that a replica is
lost, or never took the request, is decided here, and which answer to a probe means that it works.
Errors name the deployment, never the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as kserve
from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceStub

from paraserve_backend.errors import (
    InvalidRequest,
    NotFound,
    ParaServeError,
    Unavailable,
    read_coded,
)
from paraserve_backend.protocol.names import PROBE_PARAMETER, REPLICA_PARAMETER
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.channels import triton_channel
from paraserve_backend.rpc.errors import error_from_code, is_connection_lost
from paraserve_scheduler.gateway.kserve.errors import (
    ReplicaFailing,
    ReplicaLate,
    ReplicaLost,
    ReplicaRefused,
    clean_message,
)
from paraserve_scheduler.gateway.kserve.message_parameters import WANT_EMPTY_FINAL

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2_grpc import GRPCInferenceServiceAsyncStub

FINAL_MARK = "triton_final_response"

#: What Triton says, without a code, when a model is not there.
_NOT_SERVED = re.compile(r"unknown model|no available versions|is not ready", re.IGNORECASE)
#: The same when the model's process has died, which had or has just got the request.
_DIED = re.compile(r"is not healthy", re.IGNORECASE)
#: What gRPC says when there was no connection on which the request could have been sent.
_NEVER_SENT = re.compile(r"failed to connect|connection refused|resolution failed", re.IGNORECASE)
#: How Triton introduces an exception in a model.
_MODEL_FAILED = "Failed to process the request(s)"
_END_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseTimeouts:
    """How long a replica may be silent: before its first response, and between two."""

    first_s: float
    next_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Server:
    channel: grpc.aio.Channel
    #: Kept: making one takes 30 µs.
    stub: GRPCInferenceServiceAsyncStub


class Upstream:
    """Keeps one channel per Triton server."""

    def __init__(self) -> None:
        self._servers: dict[str, _Server] = {}
        #: Streams that have had their final response and are left to end.
        self._ending: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        await asyncio.gather(*self._ending)
        for server in self._servers.values():
            await server.channel.close(grace=None)
        self._servers.clear()

    async def responses(
        self, endpoint: pb.Endpoint, request: kserve.ModelInferRequest, timeouts: ResponseTimeouts
    ) -> AsyncGenerator[kserve.ModelInferResponse, None]:
        """Yield the replica's responses up to the one marked final, under the client's model name.

        The final one may be empty. Closing the iterator cancels the request at the replica.

        Raises:
            ReplicaRefused: nothing was done for this request.
            ReplicaLate: the replica was silent for too long.
            ReplicaLost: it died with the request.
            ReplicaFailing: it cannot go on with the request.
            ParaServeError: what the model answered, under its own code.
        """
        stream = _Stream(self._stub(endpoint.triton_grpc_address), endpoint, request)
        try:
            timeout_s = timeouts.first_s
            while (response := await stream.read(timeout_s)) is not None:
                timeout_s = timeouts.next_s
                yield response
        finally:
            self._leave(stream)

    async def probe(self, endpoint: pb.Endpoint) -> bool:
        """Ask a replica whether it works, and wait for its answer as long as that takes.

        It works if it answers, if only to say that it knows no probes. It does not if it says that
        its passes do not return, or if nobody is there.
        """
        request = kserve.ModelInferRequest()
        request.parameters[PROBE_PARAMETER].bool_param = True
        stream = _Stream(self._stub(endpoint.triton_grpc_address), endpoint, request)
        try:
            await stream.read(None)
        except (ReplicaFailing, ReplicaRefused, ReplicaLost):
            return False
        except ParaServeError:
            return True
        finally:
            self._leave(stream)
        return True

    def _leave(self, stream: _Stream) -> None:
        """Cancel a stream, unless it is ending anyway.

        Triton 2.51 may never let go of a request whose stream is cancelled while its final
        response is on the way: its model can then not be unloaded (11 of 1200 such cancels).
        """
        if not stream.is_finished:
            stream.cancel()
            return
        task = asyncio.create_task(stream.wait_for_end())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _stub(self, address: str) -> GRPCInferenceServiceAsyncStub:
        if address not in self._servers:
            channel = triton_channel(address)
            self._servers[address] = _Server(
                channel=channel, stub=GRPCInferenceServiceStub(channel)
            )
        return self._servers[address].stub


class _Stream:
    def __init__(
        self,
        stub: GRPCInferenceServiceAsyncStub,
        endpoint: pb.Endpoint,
        request: kserve.ModelInferRequest,
    ) -> None:
        self._model = endpoint.model
        self._deployment = request.model_name
        self._call = stub.ModelStreamInfer(iter((_addressed(request, endpoint),)))
        self._messages = aiter(self._call)
        self._is_started = False
        #: Whether the final response has been read.
        self.is_finished = False

    def cancel(self) -> None:
        self._call.cancel()

    async def read(self, timeout_s: float | None) -> kserve.ModelInferResponse | None:
        """Return the next response, or None after the final one."""
        if self.is_finished:
            return None
        message = await self._next_message(timeout_s)
        if message.error_message:
            # Nothing comes after it: there is nothing to cancel.
            self.is_finished = True
            raise self._error(message.error_message)
        response = message.infer_response
        self._is_started = True
        self.is_finished = is_final(response)
        response.model_name = self._deployment
        return response

    async def _next_message(self, timeout_s: float | None) -> kserve.ModelStreamInferResponse:
        try:
            async with asyncio.timeout(timeout_s):
                return await anext(self._messages)
        except TimeoutError:
            raise ReplicaLate(self._silence(timeout_s)) from None
        except StopAsyncIteration:
            raise ReplicaLost(
                f"The replica of '{self._deployment}' ended its stream early."
            ) from None
        except grpc.aio.AioRpcError as error:
            raise self._call_error(error) from None

    async def wait_for_end(self) -> None:
        """Read on until the server has ended the stream; cancel it if that takes too long."""
        with contextlib.suppress(TimeoutError, StopAsyncIteration, grpc.aio.AioRpcError):
            async with asyncio.timeout(_END_TIMEOUT_S):
                await anext(self._messages)
        self.cancel()

    def _silence(self, timeout_s: float | None) -> str:
        what = "a next token" if self._is_started else "a first response"
        return (
            f"The replica of '{self._deployment}' did not send {what} within {timeout_s:g} s; "
            "it may be overloaded or dead."
        )

    def _error(self, text: str) -> ParaServeError:
        """Return the error for a sentence in the stream, the model's or Triton's own.

        Codes are not asked for: a header would bring them, but with it a tritonserver 2.51 died
        twice in 3000 such errors. Our models lead the sentence with the code.
        """
        sentence = self._clean(text)
        code = read_coded(sentence)
        if code is not None and code[0] == NotFound.grpc_code:
            return self._refusal()  # a slot that is another replica by now
        if code is not None and code[0] == Unavailable.grpc_code:
            return ReplicaFailing(code[1])
        if code is not None:
            return error_from_code(*code)
        if _DIED.search(text):
            return self._loss()
        if _NOT_SERVED.search(text):
            return self._refusal()
        if _MODEL_FAILED in text:
            return ParaServeError(f"The model of '{self._deployment}' failed: {sentence}")
        return InvalidRequest(sentence)

    def _call_error(self, error: grpc.aio.AioRpcError) -> ParaServeError:
        # A model that answers UNAVAILABLE does so in a message, not as the call's end.
        text = error.details() or ""
        if _NOT_SERVED.search(text):
            return self._refusal()
        if _DIED.search(text):
            return self._loss()
        if is_connection_lost(error):
            return self._refusal() if _NEVER_SENT.search(text) else self._loss()
        return error_from_code(error.code().name, self._clean(text))

    def _loss(self) -> ParaServeError:
        return ReplicaLost(f"The replica of '{self._deployment}' was lost.")

    def _refusal(self) -> ParaServeError:
        if self._is_started:
            return self._loss()
        return ReplicaRefused(f"The replica of '{self._deployment}' has just gone; retry.")

    def _clean(self, text: str) -> str:
        return clean_message(text).replace(f"'{self._model}'", f"'{self._deployment}'")


def is_final(response: kserve.ModelInferResponse) -> bool:
    mark = response.parameters.get(FINAL_MARK)
    return mark is not None and mark.bool_param


def _addressed(
    request: kserve.ModelInferRequest, endpoint: pb.Endpoint
) -> kserve.ModelInferRequest:
    """Return the client's request as the replica gets it; the end is always to be marked."""
    addressed = kserve.ModelInferRequest()
    addressed.CopyFrom(request)
    addressed.model_name = endpoint.model
    addressed.model_version = ""
    addressed.parameters[WANT_EMPTY_FINAL].bool_param = True
    # A slot may serve another replica when the request gets there.
    addressed.parameters[REPLICA_PARAMETER].string_param = endpoint.replica
    return addressed
