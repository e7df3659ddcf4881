"""Which parameters a client's message may have, and which of them go on to a replica.

Reserved names are refused wherever a name can be. What is not reserved and no replica knows is
dropped, so that nothing reaches one that nobody has thought of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from itertools import chain

from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.protocol.request import SETTINGS, refuse_reserved
from paraserve_backend.protocol.request_settings import show

#: Request parameter in microseconds; it is kept here and goes to no replica.
TIME_LIMIT = "timeout"
WANT_EMPTY_FINAL = "triton_enable_empty_final_response"
#: Most inputs, outputs or parameters in one place.
MAX_ENTRIES = 256
#: Of Triton's own parameters, which steer a server; it refuses them from clients too.
_TRITON_PREFIX = "triton_"
#: Asks Triton to answer with the largest elements of an output and their positions.
_CLASSIFICATION = "classification"
_Tensor = (
    kserve.ModelInferRequest.InferInputTensor | kserve.ModelInferRequest.InferRequestedOutputTensor
)
_KEPT = SETTINGS | {TIME_LIMIT, WANT_EMPTY_FINAL}


def check_names(message: kserve.ModelInferRequest) -> None:
    """Count the entries of a message and refuse reserved names of parameters and tensors.

    Raises:
        InvalidRequest: there are too many, or one is reserved.
    """
    check_count(message.inputs, "inputs")
    check_count(message.outputs, "outputs")
    _check_parameters(message.parameters)
    for tensor in chain[_Tensor](message.inputs, message.outputs):
        check_name(tensor.name)
        _check_parameters(tensor.parameters)


def _check_parameters(parameters: Mapping[str, kserve.InferParameter]) -> None:
    check_count(parameters, "parameters")
    for name in parameters:
        check_name(name)


def check_count(entries: Sized, what: str) -> None:
    """Refuse more than `MAX_ENTRIES`, before any of them is looked at."""
    if len(entries) > MAX_ENTRIES:
        raise InvalidRequest(
            f"The request has {len(entries)} {what} in one place; {MAX_ENTRIES} at most."
        )


def check_name(name: str) -> None:
    """Refuse a name that is ours or Triton's own."""
    refuse_reserved(name)
    if name.startswith(_TRITON_PREFIX) and name != WANT_EMPTY_FINAL:
        raise InvalidRequest(f"The name {show(name)} is reserved for Triton itself; leave it out.")


def drop_unknown(message: kserve.ModelInferRequest) -> None:
    """Leave in a checked message only the parameters that a replica, or this gateway, knows.

    Raises:
        InvalidRequest: an output is wanted in a form that no replica makes.
    """
    for name in [name for name in message.parameters if name not in _KEPT]:
        del message.parameters[name]
    for output in message.outputs:
        if _CLASSIFICATION in output.parameters:
            raise InvalidRequest(
                f"Output {show(output.name)} is wanted as a classification, which no output of a "
                "language model is; leave that out."
            )
    for tensor in chain[_Tensor](message.inputs, message.outputs):
        tensor.ClearField("parameters")
