"""Calls to the node's Triton: is it live, load, unload, states of models, commands to slots.

Nothing else uses the repository API. What Triton says when a load fails becomes one of our errors
here. Each call is one request; waiting and clean-up are in `unloader`.
"""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

import grpc
import grpc.aio
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc as service

from paraserve_backend import errors
from paraserve_backend.errors import (
    BY_CODE,
    DeadlineExceeded,
    InvalidRequest,
    ParaServeError,
    Unavailable,
    read_coded,
)
from paraserve_backend.protocol.names import (
    COMMAND_PARAMETER,
    REPLICA_PARAMETER,
    SECRET_PARAMETER,
)
from paraserve_backend.rpc.channels import triton_channel
from paraserve_backend.rpc.errors import is_connection_lost

#: For calls that Triton answers at once; loads and unloads may take as long as the model does.
_ANSWER_TIMEOUT_S = 5.0
#: For the question whether it is live: two such silences make 3 s.
_LIVE_TIMEOUT_S = 1.5


class ModelState(StrEnum):
    """Triton's word for a model; `ABSENT` also stands for one that was never loaded."""

    ABSENT = ""
    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class Triton(Protocol):
    """What the agent needs of Triton. Every call raises `Unavailable` where Triton is gone."""

    async def live(self) -> bool | None:
        """Say whether Triton is live; `None`: it did not say in time. Never raises."""

    async def load(self, model: str) -> None:
        """Load a model and return when it is ready.

        Raises:
            DeadlineExceeded: the answer did not come; the load goes on.
            ParaServeError: the model failed to load, and why.
        """

    async def unload(self, model: str) -> None:
        """Begin to unload a model; waits for a load that runs. An unknown model is no error."""

    async def states(self) -> dict[str, ModelState]:
        """Return the state of every model in the repository or in memory."""

    async def command(
        self,
        model: str,
        command: str,
        *,
        secret: str,
        replica: str = "",
        timeout_s: float | None = _ANSWER_TIMEOUT_S,
    ) -> None:
        """Send a request without inputs, whose parameter says what to do, and await its end.

        Args:
            model: Triton's name of it.
            command: JSON; what the role that the model has understands.
            secret: what the agent has written for the model's process.
            replica: what the model must be at that moment, if it is a slot.
            timeout_s: for the answer; `None`: however long it takes.

        Raises:
            ParaServeError: what the model answered instead.
        """


class TritonClient:
    """`Triton` over gRPC. `key` is `name=secret` of a restricted repository API."""

    def __init__(self, address: str, *, key: str | None = None) -> None:
        self._address = address
        self._metadata = _key_metadata(key)
        self._channel = triton_channel(address)
        self._stub: Any = service.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        await self._channel.close(grace=None)

    async def live(self) -> bool | None:
        request = messages.ServerLiveRequest()
        try:
            answer = await self._stub.ServerLive(request, timeout=_LIVE_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            is_late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            return None if is_late else False
        return bool(answer.live)

    async def load(self, model: str) -> None:
        request = messages.RepositoryModelLoadRequest(model_name=model)
        try:
            await self._stub.RepositoryModelLoad(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            if is_connection_lost(error) or error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self._error(error) from None
            raise load_error(model, error.details() or "") from None

    async def unload(self, model: str) -> None:
        request = messages.RepositoryModelUnloadRequest(model_name=model)
        try:
            await self._stub.RepositoryModelUnload(request, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    async def states(self) -> dict[str, ModelState]:
        try:
            index = await self._stub.RepositoryIndex(
                messages.RepositoryIndexRequest(),
                metadata=self._metadata,
                timeout=_ANSWER_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None
        return {model.name: ModelState(model.state) for model in index.models}

    async def command(
        self,
        model: str,
        command: str,
        *,
        secret: str,
        replica: str = "",
        timeout_s: float | None = _ANSWER_TIMEOUT_S,
    ) -> None:
        request = messages.ModelInferRequest(model_name=model)
        request.parameters[COMMAND_PARAMETER].string_param = command
        request.parameters[SECRET_PARAMETER].string_param = secret
        request.parameters[REPLICA_PARAMETER].string_param = replica
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        call = self._stub.ModelStreamInfer(
            iter((request,)),
            metadata=self._metadata,
            timeout=timeout_s,
        )
        try:
            # To its end: a stream must not be cancelled while its final response is on the way.
            async for message in call:
                if message.error_message:
                    raise _refusal(message.error_message)
        except grpc.aio.AioRpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.aio.AioRpcError) -> ParaServeError:
        details = error.details() or ""
        if "restricted" in details:
            return InvalidRequest(
                f"Triton at {self._address} restricts its repository API: set triton_key_file."
            )
        if is_connection_lost(error):
            return Unavailable(f"Triton at {self._address} does not answer.")
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"Triton at {self._address} did not answer in time.")
        return ParaServeError(f"Triton at {self._address} failed: {details}")


def _refusal(text: str) -> ParaServeError:
    """The error for what the model, or Triton in its place, answered to a command."""
    coded = read_coded(text)
    if coded is None:
        return Unavailable(text)
    code, sentence = coded
    return BY_CODE.get(code, ParaServeError)(sentence)


def read_key(path: Path | None) -> str | None:
    """Return the `name=secret` that `triton_key_file` holds.

    Raises:
        InvalidRequest: the file cannot be read or holds something else.
    """
    if path is None:
        return None
    try:
        key = path.read_text(encoding="utf-8").strip()
    except OSError as error:
        raise InvalidRequest(f"Cannot read triton_key_file {path}: {error.strerror}.") from None
    if "=" not in key:
        raise InvalidRequest(f"triton_key_file {path} must hold name=secret.")
    return key


def _key_metadata(key: str | None) -> tuple[tuple[str, str], ...]:
    if key is None:
        return ()
    name, _, secret = key.partition("=")
    return ((f"triton-grpc-protocol-{name}", secret),)


# What Triton 2.51 says: "load failed for model 'm': version 1 is at UNAVAILABLE state: Internal:
# TritonModelException: INVALID_ARGUMENT: Tensor x is missing.\n\nAt:\n  /.../model.py(7): ...\n;\n"
_PREAMBLE = re.compile(r"^load failed for model '[^']*': (?:version \d+ is at \w+ state: )?")
_STATUS = re.compile(r"^(?:Internal|Invalid argument|Unavailable|Not found|Unsupported): ")
_EXCEPTION = re.compile(r"^(?:[A-Za-z_]\w*\.)*([A-Z]\w*): ")
_DEAD_STUB = re.compile(r"Stub process '[^']*' is not healthy")
_OWN: dict[str, type[errors.ParaServeError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, errors.ParaServeError)
}


def load_error(model: str, details: str) -> errors.ParaServeError:
    """Return what made `model` fail: our own exception again where the model raised one."""
    if _DEAD_STUB.search(details):
        return errors.Unavailable(f"The process of model {model} died while it loaded.")
    text = _STATUS.sub("", _PREAMBLE.sub("", _without_traceback(details)))
    exception = _EXCEPTION.match(text)
    kind = exception.group(1) if exception else ""
    if kind in _OWN and exception:
        return _OWN[kind](text[exception.end() :])
    if kind == "TritonModelException" and exception:
        text = text[exception.end() :]
    coded = errors.read_coded(text)
    if coded and coded[0] in errors.BY_CODE:
        return errors.BY_CODE[coded[0]](coded[1])
    return errors.ParaServeError(f"Model {model} failed to load: {text}")


def _without_traceback(details: str) -> str:
    text = details.partition("\n\nAt:\n")[0]
    return " ".join(text.split()).rstrip(";").strip()
