"""Admits a request: brings it into the form that replicas take, and refuses what can only fail.

A refused request wakes no replica. Nothing here waits, and each tensor is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import ABILITIES, can_be_carried, check
from paraserve_backend.protocol.request import GenerateRequest, parse_request
from paraserve_backend.protocol.request_settings import Settings
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.kserve.message_tensors import check_outputs, read_inputs

TIME_LIMIT = "timeout"
_MAX_US = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedRequest:
    #: The client's own message, in the form that replicas take.
    message: kserve.ModelInferRequest
    asked: GenerateRequest
    #: Whether the prompt came with a leading dimension of 1.
    is_batch_of_one: bool
    #: Whether another replica can go on in the middle of the answer.
    can_move: bool


def take_time_limit_us(message: kserve.ModelInferRequest) -> int | None:
    """Take the limit out of a request's parameters; 0 is none, as in Triton.

    Raises:
        InvalidRequest: it is no whole number, or negative.
    """
    if TIME_LIMIT not in message.parameters:
        return None
    given = Settings({}, {TIME_LIMIT: _value(message.parameters[TIME_LIMIT])})
    limit_us = given.optional_integer(TIME_LIMIT, low=0, high=_MAX_US)
    # It is kept here, and Triton's gRPC service takes it in one of its forms only.
    del message.parameters[TIME_LIMIT]
    return limit_us or None


def admit(
    message: kserve.ModelInferRequest, route: pb.Route, *, may_stream: bool, fresh_seed: int
) -> AdmittedRequest:
    """Normalise a request, check it and read what it asks for.

    Args:
        message: of the deployment that `route` leads to; changed in place.
        route: names the engine that has to be able to do what is asked.
        may_stream: whether the call can take more than one response.
        fresh_seed: the seed of a request that names none.

    Raises:
        InvalidRequest: says which tensor or setting is wrong and what is expected.
    """
    inputs = read_inputs(message)
    check_outputs(message)
    parameters = {name: _value(parameter) for name, parameter in message.parameters.items()}
    asked = parse_request(inputs.elements, parameters, fresh_seed=fresh_seed)
    abilities = ABILITIES.get(route.engine)
    if abilities is not None:
        check(asked, abilities)
    if asked.is_stream and not may_stream:
        raise InvalidRequest(
            "A request with one response cannot have 'stream' true: use ModelStreamInfer "
            "(gRPC) or generate_stream (HTTP)."
        )
    return AdmittedRequest(
        message=message,
        asked=asked,
        is_batch_of_one=inputs.is_batch_of_one,
        can_move=abilities is None or can_be_carried(asked, abilities),
    )


def _value(parameter: kserve.InferParameter) -> Any:
    """Return the value in whichever form it was sent; `None` for none."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)
