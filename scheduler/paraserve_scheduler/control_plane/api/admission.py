"""Decides whether something can be deployed: checks its settings and the checkpoint they name.

It has headers read from the source, so it blocks. It stores and places nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from paraserve_backend.architectures.spec import ModelSpec
from paraserve_backend.errors import InvalidCheckpoint, InvalidRequest
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.weights.checkpoint.child import read_apart
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_backend.weights.checkpoint.model import spec_of
from paraserve_scheduler.control_plane.config import DeploymentDefaults
from paraserve_scheduler.state.spec import Deployment, DeploymentSpec

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_DEVICES = ("cpu", "cuda")
_TOKENIZER = "tokenizer.json"


def validated_spec(message: pb.DeploymentSpec, defaults: DeploymentDefaults) -> DeploymentSpec:
    """Check what the user stated and fill in the rest.

    Raises:
        InvalidRequest: names the field and what it may be.
    """
    if not _NAME.fullmatch(message.name):
        raise InvalidRequest(
            f"Deployment name {message.name!r} is not valid: use 1 to 63 lower-case letters, "
            "digits and dashes, with no dash at either end."
        )
    if message.device and message.device not in _DEVICES:
        raise InvalidRequest(f"device {message.device!r} is not one of {', '.join(_DEVICES)}.")
    stated = {field.name: value for field, value in message.ListFields()}
    for name, value in stated.items():
        if isinstance(value, float):
            _check_seconds(name, value)
    checked = {
        "source": message.source,
        "max_replicas": _max_replicas(message, defaults),
        "engine": _engine(message.engine),
    }
    return DeploymentSpec(**asdict(defaults) | stated | checked)


def read_deployment(spec: DeploymentSpec, source_roots: Sequence[Path] = ()) -> Deployment:
    """Have the checkpoint's headers and tokenizer read, and check that we can run the model.

    Folders are read below `source_roots` only, where there are any.

    Raises:
        InvalidCheckpoint, UnsupportedModel: the files are wrong or of a kind we cannot run.
        InvalidRequest: the source or the context length does not make sense.
        NotFound, AccessDenied, SourceUnavailable: the source cannot be read.
    """
    read = read_apart(
        spec.source, endpoint_url=spec.endpoint_url, region=spec.region, roots=source_roots
    )
    index = read.index
    model = spec_of(index)
    _check_tokenizer(spec, index)
    _check_context(spec, model)
    return Deployment(
        spec=spec,
        model=model,
        index=index,
        longest_token_bytes=read.longest_token_bytes,
    )


def _max_replicas(message: pb.DeploymentSpec, defaults: DeploymentDefaults) -> int:
    if not message.max_replicas:
        return max(defaults.max_replicas, message.min_replicas)
    if message.max_replicas < message.min_replicas:
        raise InvalidRequest(
            f"max_replicas {message.max_replicas} is less than min_replicas "
            f"{message.min_replicas}: make it at least as many."
        )
    return message.max_replicas


def _engine(name: str) -> EngineName:
    try:
        return EngineName(name or EngineName.PARASERVE)
    except ValueError:
        raise InvalidRequest(f"engine {name!r} is not one of {', '.join(EngineName)}.") from None


def _check_seconds(field: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0:
        raise InvalidRequest(f"{field} is {value:g}; it must be a finite number of seconds > 0.")


def _check_tokenizer(spec: DeploymentSpec, index: CheckpointIndex) -> None:
    if _TOKENIZER not in {stored.key for stored in index.files}:
        raise InvalidCheckpoint(
            f"{spec.source} has no {_TOKENIZER}: save the tokenizer beside the weights "
            "(tokenizer.save_pretrained of a fast tokenizer)."
        )


def _check_context(spec: DeploymentSpec, model: ModelSpec) -> None:
    if spec.max_context is not None and spec.max_context > model.context_length:
        raise InvalidRequest(
            f"max_context {spec.max_context} is more than the {model.context_length} tokens "
            f"the model was made for."
        )
