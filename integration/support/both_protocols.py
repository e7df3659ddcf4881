"""One request with Triton's own two clients, unmodified; what a gateway answers to both."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from integration.support.tiny_cluster import TinyCluster
from paraserve_backend.errors import ParaServeError

NUMPY: Mapping[str, Any] = {
    "BYTES": np.object_,
    "BOOL": np.bool_,
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "FP32": np.float32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request for one response; each input is a datatype and its elements."""

    model: str
    version: str = ""
    inputs: Mapping[str, tuple[str, Any]]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """What both clients were told."""

    grpc_code: str
    http_status: int
    grpc_sentence: str
    http_sentence: str


def both_told(error: type[ParaServeError], sentence: str) -> Refused:
    return Refused(
        grpc_code=error.grpc_code,
        http_status=error.http_status,
        grpc_sentence=sentence,
        http_sentence=sentence,
    )


def refused(cluster: TinyCluster, request: Request) -> Refused:
    with pytest.raises(InferenceServerException) as over_grpc:
        ask_grpc(cluster, request)
    with pytest.raises(InferenceServerException) as over_http:
        ask_http(cluster, request)
    return Refused(
        grpc_code=str(over_grpc.value.status()).removeprefix("StatusCode."),
        http_status=int(over_http.value.status() or 0),
        grpc_sentence=over_grpc.value.message(),
        http_sentence=over_http.value.message(),
    )


def ask_grpc(cluster: TinyCluster, request: Request) -> list[int]:
    """Return the answer's tokens."""
    address = cluster.layout.gateway_address
    with closing(tritonclient.grpc.InferenceServerClient(address)) as client:
        return _ask(client, tritonclient.grpc, request)


def ask_http(cluster: TinyCluster, request: Request) -> list[int]:
    layout = cluster.layout
    url = f"{layout.host}:{layout.gateway_http_port}"
    with closing(tritonclient.http.InferenceServerClient(url)) as client:
        return _ask(client, tritonclient.http, request)


def _ask(client: Any, package: Any, request: Request) -> list[int]:
    inputs = []
    for name, (datatype, values) in request.inputs.items():
        array = np.array(values, NUMPY[datatype])
        tensor = package.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        inputs.append(tensor)
    result = client.infer(
        request.model,
        inputs,
        model_version=request.version,
        outputs=[package.InferRequestedOutput(name) for name in request.outputs] or None,
        parameters=dict(request.parameters) or None,
    )
    ids: list[int] = result.as_numpy("output_ids").tolist()
    return ids
