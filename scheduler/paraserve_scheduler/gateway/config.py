"""What a gateway can be told. Every time limit is in seconds and says which wait it covers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    #: host:port of the scheduler.
    scheduler_address: str
    #: Tells the gateways of one cluster apart in demand reports; empty: host name and process.
    name: str = ""
    grpc_address: str = "127.0.0.1:8001"
    http_address: str = "127.0.0.1:8000"
    #: File with the cluster token that the scheduler asks for.
    token_file: Path | None = None
    #: Held because no replica is ready.
    cold_start_timeout_s: float = 600.0
    #: From the moment a replica has a streamed request to its first token.
    first_token_timeout_s: float = 120.0
    #: Between two responses of one stream; a dead replica process is silent.
    inter_token_timeout_s: float = 30.0
    #: A request that is not streamed gets its one response at the end of the generation.
    unstreamed_timeout_s: float = 600.0
    #: Per deployment; more are refused at once.
    max_held_requests: int = 1000
    #: Body of one HTTP request, after decompression.
    max_request_bytes: int = 64 * _MIB
