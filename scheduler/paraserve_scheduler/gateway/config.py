"""Settings of a gateway: addresses, time limits and the size of requests.

Every time limit is in seconds and says which wait it covers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

_MIB = 1 << 20
MAX_HELD_BYTES = 256 * _MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    scheduler_address: Annotated[str, "host:port of the scheduler."]
    name: Annotated[
        str,
        "Tells the gateways of a cluster apart, if host name and process id shall not.",
    ] = ""
    grpc_address: Annotated[str, "Where it serves gRPC, host:port."] = "127.0.0.1:8001"
    http_address: Annotated[str, "Where it serves HTTP, host:port."] = "127.0.0.1:8000"
    token_file: Annotated[
        Path | None,
        "File with the cluster token, if it is not in PARASERVE_TOKEN.",
    ] = None
    cold_start_timeout_s: Annotated[
        float, "Longest wait for a replica to become ready, or to have room."
    ] = 600.0
    first_token_timeout_s: Annotated[
        float,
        "From the moment a replica has a streamed request to its first response.",
    ] = 120.0
    inter_token_timeout_s: Annotated[
        float,
        "Longest silence between two responses of one stream.",
    ] = 30.0
    unstreamed_timeout_s: Annotated[
        float,
        "Longest wait for the one response to a request that is not streamed.",
    ] = 600.0
    max_request_bytes: Annotated[
        int, "Largest request over either protocol, as it comes and unpacked."
    ] = 4 * _MIB
    max_large_requests: Annotated[
        int, "Requests of more than 32 KiB that are read or wait for that; one more is refused."
    ] = 16
    large_request_timeout_s: Annotated[
        float, "Longest reading of one request of more than 32 KiB; a longer one is refused."
    ] = 10.0
    max_stream_requests: Annotated[
        int, "Requests of one gRPC stream at once; the next is read when one has ended."
    ] = 256
    max_held_bytes: Annotated[
        int, "Requests of so many bytes may wait here for replicas, all deployments together."
    ] = MAX_HELD_BYTES
