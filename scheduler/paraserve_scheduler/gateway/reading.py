"""Turns the bytes of a request into a checked message. Pure: the same for small and large ones.

Small ones are read on the event loop, large ones in the process of `gateway.large_requests`.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from enum import StrEnum

from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_scheduler.gateway.admission import ClientRequest, check
from paraserve_scheduler.gateway.kserve.compression import unpack
from paraserve_scheduler.gateway.kserve.errors import TooLarge
from paraserve_scheduler.gateway.kserve.json_codec import (
    BinaryOutputs,
    generate_request,
    infer_request,
)
from paraserve_scheduler.gateway.kserve.message_parameters import TIME_LIMIT

#: Requests of at most this size are read on the event loop.
MAX_SMALL_BYTES = 32 << 10
#: Of the names that a refused request is answered under; longer ones name nothing.
_MAX_NAME_CHARACTERS = 1024


class Form(StrEnum):
    """What the bytes of a request are."""

    #: A serialized ModelInferRequest.
    MESSAGE = "message"
    GENERATE = "generate"
    INFER = "infer"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadRequest:
    form: Form
    body: bytes
    #: Whether the body is packed, by gzip or deflate.
    is_packed: bool
    #: From the path of an HTTP call; a message names them itself.
    deployment: str = ""
    version: str = ""
    #: How many bytes of an infer call's unpacked body are JSON, if it has binary tensors.
    header_bytes: int | None = None

    def unpacked(self, limit_bytes: int) -> UnreadRequest:
        """Return it with its body unpacked.

        Raises:
            TooLarge: unpacked it is larger than the limit.
            InvalidRequest: it cannot be unpacked.
        """
        if len(self.body) > limit_bytes:
            raise TooLarge.than(limit_bytes)
        if not self.is_packed:
            return self
        return replace(self, body=unpack(self.body, limit_bytes), is_packed=False)


def read(request: UnreadRequest) -> ClientRequest:
    """Read and check a request that is not packed.

    Raises:
        InvalidRequest: it cannot be read at all, so that nobody knows what it is for.
    """
    message, binary = _parse(request)
    try:
        checked = check(message, fresh_seed=secrets.randbits(63))
    except InvalidRequest as error:
        return ClientRequest(message=_head(message), checked=error)
    return ClientRequest(message=message, checked=checked, binary=binary)


def _parse(request: UnreadRequest) -> tuple[kserve.ModelInferRequest, BinaryOutputs]:
    deployment, version, body = request.deployment, request.version, request.body
    match request.form:
        case Form.MESSAGE:
            try:
                return kserve.ModelInferRequest.FromString(body), BinaryOutputs()
            except DecodeError:
                raise InvalidRequest("The request is no message of this call.") from None
        case Form.GENERATE:
            return generate_request(deployment, version, body), BinaryOutputs()
        case Form.INFER:
            return infer_request(deployment, version, body, request.header_bytes)


def _head(message: kserve.ModelInferRequest) -> kserve.ModelInferRequest:
    """Return what is needed to refuse a request: whose it is, and how long it might have taken."""
    head = kserve.ModelInferRequest(
        model_name=message.model_name[:_MAX_NAME_CHARACTERS],
        model_version=message.model_version[:_MAX_NAME_CHARACTERS],
        id=message.id[:_MAX_NAME_CHARACTERS],
    )
    if TIME_LIMIT in message.parameters:
        head.parameters[TIME_LIMIT].CopyFrom(message.parameters[TIME_LIMIT])
    return head
