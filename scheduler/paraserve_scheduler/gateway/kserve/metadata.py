"""Metadata and configuration of a deployment as KServe clients see them, whether it runs or not.

One JSON form each, from which the gRPC messages are made.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from google.protobuf import json_format
from tritonclient.grpc import model_config_pb2
from tritonclient.grpc import service_pb2 as kserve

from paraserve_backend.protocol.tensors import INPUTS, OUTPUTS, TensorSpec

SERVER_NAME = "paraserve"
MODEL_VERSION = "1"
_EXTENSIONS = ("binary_tensor_data", "generate", "model_configuration", "parameters", "statistics")

Json = dict[str, Any]


def server_metadata() -> Json:
    return {
        "name": SERVER_NAME,
        "version": importlib.metadata.version("paraserve"),
        "extensions": list(_EXTENSIONS),
    }


def model_metadata(deployment: str) -> Json:
    return {
        "name": deployment,
        "versions": [MODEL_VERSION],
        "platform": SERVER_NAME,
        "inputs": [_tensor_metadata(spec) for spec in INPUTS],
        "outputs": [_tensor_metadata(spec) for spec in OUTPUTS],
    }


def model_config(deployment: str) -> Json:
    return {
        "name": deployment,
        "platform": "",
        "backend": SERVER_NAME,
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": 0,
        "input": [_tensor_config(spec) | {"optional": spec.optional} for spec in INPUTS],
        "output": [_tensor_config(spec) for spec in OUTPUTS],
        "model_transaction_policy": {"decoupled": True},
    }


def model_index(deployments: tuple[str, ...]) -> list[Json]:
    # A deployment at zero answers requests, and that is what READY says.
    return [{"name": name, "version": MODEL_VERSION, "state": "READY"} for name in deployments]


def server_metadata_message() -> kserve.ServerMetadataResponse:
    return json_format.ParseDict(server_metadata(), kserve.ServerMetadataResponse())


def model_metadata_message(deployment: str) -> kserve.ModelMetadataResponse:
    return json_format.ParseDict(model_metadata(deployment), kserve.ModelMetadataResponse())


def model_config_message(deployment: str) -> kserve.ModelConfigResponse:
    config = json_format.ParseDict(model_config(deployment), model_config_pb2.ModelConfig())
    return kserve.ModelConfigResponse(config=config)


def model_index_message(deployments: tuple[str, ...]) -> kserve.RepositoryIndexResponse:
    index = {"models": model_index(deployments)}
    return json_format.ParseDict(index, kserve.RepositoryIndexResponse())


def _tensor_metadata(spec: TensorSpec) -> Json:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def _tensor_config(spec: TensorSpec) -> Json:
    return {"name": spec.name, "data_type": spec.config_datatype, "dims": list(spec.shape)}
