"""Admits a request: brings it into the form that replicas take, and refuses what can only fail.

A refused request wakes no replica. Nothing here waits, and each tensor is read once. What can be
said without the deployment's route is said first, by `check`: it may run in another process, where
large requests are read (`gateway.large_requests`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.engine_abilities import ABILITIES, can_be_carried
from paraserve_backend.protocol.engine_abilities import check as check_abilities
from paraserve_backend.protocol.request import GenerateRequest, parse_request
from paraserve_backend.protocol.request_settings import Settings
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.kserve.json_codec import BinaryOutputs
from paraserve_scheduler.gateway.kserve.message_parameters import (
    TIME_LIMIT,
    check_names,
    drop_unknown,
)
from paraserve_scheduler.gateway.kserve.message_tensors import check_outputs, read_inputs

_MAX_US = 2**63 - 1
_MAX_ID_BYTES = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedRequest:
    """What a message asks for, if any deployment may be asked for it."""

    #: Without its prompt, which is in the message alone: it may be a million tokens.
    asked: GenerateRequest
    #: One of the two is 0.
    prompt_bytes: int
    num_input_ids: int
    #: Whether the prompt came with a leading dimension of 1.
    is_batch_of_one: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientRequest:
    """A request as a frontend hands it to the proxy."""

    #: If it was checked, in the form that replicas take; else it may be no more than its head.
    message: kserve.ModelInferRequest
    #: Or why no deployment may be asked for it.
    checked: CheckedRequest | InvalidRequest
    binary: BinaryOutputs = field(default_factory=BinaryOutputs)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmittedRequest:
    #: The client's own message, in the form that replicas take.
    message: kserve.ModelInferRequest
    #: Without its prompt.
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


def check(message: kserve.ModelInferRequest, *, fresh_seed: int) -> CheckedRequest:
    """Normalise a message, check it and read what it asks for.

    Args:
        message: changed in place; afterwards it has only parameters that a replica knows.
        fresh_seed: the seed of a request that names none.

    Raises:
        InvalidRequest: says which tensor or setting is wrong and what is expected.
    """
    if len(message.id.encode()) > _MAX_ID_BYTES:
        raise InvalidRequest(
            f"The request's id has {len(message.id.encode())} bytes; {_MAX_ID_BYTES} at most."
        )
    # Nobody reads them, and there may be millions.
    message.DiscardUnknownFields()
    check_names(message)
    inputs = read_inputs(message)
    check_outputs(message)
    drop_unknown(message)
    parameters = {name: _value(parameter) for name, parameter in message.parameters.items()}
    asked = parse_request(inputs.elements, parameters, fresh_seed=fresh_seed)
    return CheckedRequest(
        asked=replace(asked, text=None, input_ids=None),
        prompt_bytes=len((asked.text or "").encode()),
        num_input_ids=len(asked.input_ids or ()),
        is_batch_of_one=inputs.is_batch_of_one,
    )


def admit(request: ClientRequest, route: pb.Route, *, may_stream: bool) -> AdmittedRequest:
    """Check a request against the deployment that it is for.

    Args:
        request: for the deployment that `route` leads to.
        route: names the engine that has to be able to do what is asked, and how much it holds.
        may_stream: whether the call can take more than one response.

    Raises:
        InvalidRequest: says what is wrong and what is expected.
    """
    checked = request.checked
    if isinstance(checked, InvalidRequest):
        raise checked
    _check_length(checked, route)
    abilities = ABILITIES.get(route.engine)
    if abilities is not None:
        check_abilities(checked.asked, abilities)
    if checked.asked.is_stream and not may_stream:
        raise InvalidRequest(
            "A request with one response cannot have 'stream' true: use ModelStreamInfer "
            "(gRPC) or generate_stream (HTTP)."
        )
    return AdmittedRequest(
        message=request.message,
        asked=checked.asked,
        is_batch_of_one=checked.is_batch_of_one,
        can_move=abilities is None or can_be_carried(checked.asked, abilities),
    )


def _check_length(checked: CheckedRequest, route: pb.Route) -> None:
    """Refuse a prompt that cannot fit, before anything turns it into tokens."""
    if route.max_prompt_bytes and checked.prompt_bytes > route.max_prompt_bytes:
        raise InvalidRequest(
            f"The prompt has {checked.prompt_bytes} bytes; the context of '{route.deployment}' "
            f"never holds more than {route.max_prompt_bytes}, so send less."
        )
    if route.max_context and checked.num_input_ids >= route.max_context:
        raise InvalidRequest(
            f"The prompt has {checked.num_input_ids} tokens; the context of '{route.deployment}' "
            f"holds {route.max_context}, and at least one of them is for the answer, so send less."
        )


def _value(parameter: kserve.InferParameter) -> Any:
    """Return the value in whichever form it was sent; `None` for none."""
    chosen = parameter.WhichOneof("parameter_choice")
    return None if chosen is None else getattr(parameter, chosen)
