"""Settings of one node agent. What the machine itself has is read in `node`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from paraserve_backend.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Addresses are host:port; `None` means what the comment says."""

    #: Unique in the cluster.
    name: str
    #: The scheduler's control-plane address.
    scheduler: str
    #: The node's Triton, gRPC.
    triton: str
    #: Shared with Triton, at the same path for both.
    model_repository: Path
    #: In memory (below /dev/shm): weights and channel keys lie here, while the agent runs.
    run_dir: Path
    #: Where this agent listens; port 0 takes a free one.
    listen: str = "127.0.0.1:8500"
    #: How the scheduler reaches this agent. None: as `listen` says.
    advertise: str | None = None
    #: How gateways reach this node's Triton. None: as `triton` says.
    advertise_triton: str | None = None
    #: What replicas may use. None: four fifths of what is free at start.
    memory_bytes: int | None = None
    #: Inbound bandwidth; the default is 10 Gbit/s.
    nic_bytes_per_s: float = 1.25e9
    #: Where other nodes reach this node's activation channel, on ports [start, end).
    channel_host: str = "127.0.0.1"
    channel_port_start: int = 18600
    channel_port_end: int = 18700
    #: None: what the machine has.
    devices: tuple[str, ...] | None = None
    token_file: Path | None = None
    #: Holds `name=secret` where Triton runs with --grpc-restricted-protocol=...:name=secret.
    triton_key_file: Path | None = None
    #: Connections per fetch.
    fetch_threads: int = 4
    #: For a part whose request names no deadline: fetch and load together.
    part_deadline_s: float = 600.0
    #: For a removal whose request names no deadline; then its processes are killed.
    remove_deadline_s: float = 30.0
    #: How long a failed part stays in the reports if nobody removes it.
    failure_kept_s: float = 300.0
    #: How often processes and Triton are looked at.
    watch_interval_s: float = 0.5

    def __post_init__(self) -> None:
        for key in ("scheduler", "triton", "listen", "advertise", "advertise_triton"):
            address: str | None = getattr(self, key)
            if address is not None:
                _require_address(key, address)
        if not self.run_dir.is_absolute() or not self.model_repository.is_absolute():
            raise InvalidRequest("run_dir and model_repository must be absolute paths.")
        if not 0 < self.channel_port_start < self.channel_port_end <= 65536:
            raise InvalidRequest("channel_port_start must be below channel_port_end.")


def _require_address(key: str, address: str) -> None:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidRequest(f"Setting '{key}' is {address!r}; write it as host:port.")
