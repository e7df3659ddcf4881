"""A blocking client of the scheduler for the command line; errors are ours instead of gRPC's."""

from __future__ import annotations

import socket
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import grpc

from paraserve_backend.errors import AccessDenied, ParaServeError, Unavailable
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.addresses import split_address
from paraserve_backend.rpc.auth import metadata
from paraserve_backend.rpc.channels import blocking_cluster_channel
from paraserve_backend.rpc.errors import error_from_code
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerStub

_CONNECT_TIMEOUT_S = 5.0
#: Deploying reads the headers of a checkpoint from its store.
_CALL_TIMEOUT_S = 120.0

Reply = TypeVar("Reply")


class SchedulerClient:
    """Blocking; use it as a context manager. Every method raises `ParaServeError` of our tree."""

    def __init__(self, address: str, token: str | None) -> None:
        self._address = address
        self._metadata = metadata(token)
        self._channel = blocking_cluster_channel(address)
        self._stub = SchedulerStub(self._channel)

    def __enter__(self) -> SchedulerClient:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._channel.close()

    def deploy(self, spec: pb.DeploymentSpec) -> pb.DeploymentStatus:
        return self._call(
            lambda: self._stub.Deploy(spec, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    def delete(self, name: str) -> None:
        request = pb.DeleteRequest(name=name)
        self._call(
            lambda: self._stub.Delete(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    def status(self, deployment: str = "") -> pb.ClusterStatus:
        """Return one deployment and all nodes, or everything."""
        request = pb.StatusRequest(deployment=deployment)
        return self._call(
            lambda: self._stub.Status(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    def migrate(self, deployment: str, node: str) -> pb.MigrateReply:
        """Begin to move a deployment's replica; `status` tells how that goes on."""
        request = pb.MigrateRequest(deployment=deployment, node=node)
        return self._call(
            lambda: self._stub.Migrate(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    def drain(self, node: str, *, undo: bool = False) -> pb.DrainReply:
        """Begin to empty a node, or to use it again; returns what is still there."""
        request = pb.DrainRequest(node=node, undo=undo)
        return self._call(
            lambda: self._stub.Drain(request, timeout=_CALL_TIMEOUT_S, metadata=self._metadata)
        )

    def _call(self, call: Callable[[], Reply]) -> Reply:
        _require_listener(self._address)
        try:
            return call()
        except grpc.RpcError as error:
            raise error_of(error) from None


def _require_listener(address: str) -> None:
    # gRPC's own error for this names every address it tried, and no remedy.
    try:
        socket.create_connection(split_address(address), _CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise Unavailable(
            f"No scheduler answers at {address} ({error.strerror or error}): start one, or name "
            "another with --scheduler."
        ) from None


def error_of(error: grpc.RpcError) -> ParaServeError:
    """Return what the other side raised, as far as its code tells."""
    code = error.code()
    text = error.details() or code.name
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return AccessDenied(text)
    return error_from_code(code.name, text)
