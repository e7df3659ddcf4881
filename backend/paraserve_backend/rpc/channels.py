"""Every gRPC channel and server of ours, and the only place that sets a gRPC option.

A channel goes to a process of the cluster and never through a proxy: the environment names a proxy
for the way out of the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
import grpc.aio

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc.addresses import split_address
from paraserve_backend.rpc.auth import TokenInterceptor

_Options = tuple[tuple[str, int], ...]

_ANY_SIZE: _Options = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
_NO_PROXY: _Options = (("grpc.enable_http_proxy", 0),)
#: A restarted server has the same address: gRPC alone would wait up to two minutes to look again.
_RECONNECT: _Options = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
#: A machine that vanished sends no reset: a call would wait for it until its own deadline.
_KEEPALIVE: _Options = (
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    # Without a limit: a stream that follows a slow start may carry nothing for minutes.
    ("grpc.http2.max_pings_without_data", 0),
)
#: Half of the clients' keepalive time; a server closes connections that ping more often.
_ACCEPT_KEEPALIVE: _Options = (("grpc.http2.min_ping_interval_without_data_ms", 5_000),)
#: gRPC cancels calls that come while so many others have not been looked at yet, by default some
#: beyond 1000 and all beyond 3000: a burst of clients has that in a second. To refuse is ours.
_MANY_AT_ONCE: _Options = (
    ("grpc.server.max_pending_requests", 20_000),
    ("grpc.server.max_pending_requests_hard_limit", 30_000),
)
#: Two servers on one port would share its clients at random.
_OWN_PORT: _Options = (("grpc.so_reuseport", 0),)
#: Several agents in one process must not share the back-off of their connections.
_OWN_CONNECTION: _Options = (("grpc.use_local_subchannel_pool", 1),)

_TO_CLUSTER = _ANY_SIZE + _NO_PROXY + _RECONNECT + _KEEPALIVE
#: Without keepalive: Triton closes connections that ping more often than every five minutes.
_TO_TRITON = _ANY_SIZE + _NO_PROXY + _RECONNECT + _OWN_CONNECTION


def cluster_channel(address: str) -> grpc.aio.Channel:
    """Return a channel between daemons: to a scheduler or an agent."""
    return grpc.aio.insecure_channel(address, options=_TO_CLUSTER)


def blocking_cluster_channel(address: str) -> grpc.Channel:
    """Return a channel from a command to the scheduler."""
    return grpc.insecure_channel(address, options=_TO_CLUSTER)


def triton_channel(address: str) -> grpc.aio.Channel:
    """Return a channel from a daemon to a Triton."""
    return grpc.aio.insecure_channel(address, options=_TO_TRITON)


def triton_client_arguments() -> list[tuple[str, int | str]]:
    """Return the `channel_args` of tritonclient's own client, to a gateway or a Triton."""
    return list(_TO_TRITON)


def cluster_server(token: str | None) -> grpc.aio.Server:
    """Return the server of a scheduler or an agent, which asks for the token where there is one."""
    interceptors = [TokenInterceptor(token)] if token else []
    options = _ANY_SIZE + _OWN_PORT + _ACCEPT_KEEPALIVE
    return grpc.aio.server(interceptors=interceptors, options=options)


def gateway_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]], *, max_request_bytes: int
) -> grpc.aio.Server:
    """Return the server of a gateway, whose interceptors unpack the requests."""
    options = (
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", max_request_bytes),
        ("grpc.per_message_decompression", 0),
        *_OWN_PORT,
        *_MANY_AT_ONCE,
    )
    return grpc.aio.server(interceptors=interceptors, options=options)


def listen(server: grpc.aio.Server, address: str, *, setting: str = "") -> int:
    """Make a server that is not started listen on an address; return its port.

    Raises:
        InvalidRequest: the address cannot be listened on; names the `setting` it is from.
    """
    split_address(address)
    try:
        return server.add_insecure_port(address)
    except RuntimeError:
        named = f"{setting} {address}".lstrip()
        raise InvalidRequest(
            f"Cannot listen on {named}: the address is in use or not ours."
        ) from None
