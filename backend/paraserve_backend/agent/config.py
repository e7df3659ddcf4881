"""Settings of the node agent: its addresses, memory, disk, ports, slots and time limits.

What the machine itself has is read in `agent.hardware`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from paraserve_backend.errors import InvalidRequest
from paraserve_backend.rpc.addresses import split_address

_ADDRESSES = (
    "scheduler",
    "triton",
    "listen",
    "advertise",
    "advertise_triton",
    "peer_listen",
    "advertise_peers",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentConfig:
    """Addresses are host:port."""

    name: Annotated[str, "The node's name, unique in the cluster."]
    scheduler: Annotated[str, "The scheduler's control-plane address."]
    triton: Annotated[str, "The node's Triton, gRPC."]
    model_repository: Annotated[Path, "Shared with Triton, at the same path for both."]
    run_dir: Annotated[
        Path,
        "In memory (below /dev/shm): weights and channel keys lie here. What tier_bytes keeps "
        "outlives the agent, for the next one.",
    ]
    listen: Annotated[str, "Where this agent listens; port 0 takes a free one."] = "127.0.0.1:8500"
    advertise: Annotated[
        str | None,
        "How the scheduler reaches this agent, if not as listen says.",
    ] = None
    advertise_triton: Annotated[
        str | None,
        "How gateways reach this node's Triton, if not as triton says.",
    ] = None
    memory_bytes: Annotated[
        int | None,
        "What replicas may use, if not four fifths of what is free at start.",
    ] = None
    nic_bytes_per_s: Annotated[float, "Inbound bandwidth of this node."] = 1.25e9
    channel_host: Annotated[
        str,
        "Where other nodes reach this node's activation channel, on ports [start, end).",
    ] = "127.0.0.1"
    channel_port_start: Annotated[int, "First port of the activation channel."] = 18600
    channel_port_end: Annotated[int, "First port after it that is not the channel's."] = 18700
    devices: Annotated[
        tuple[str, ...] | None, "'[cpu]' or '[cuda:0]', if not what the machine has."
    ] = None
    token_file: Annotated[
        Path | None, "File with the cluster token, if it is not in PARASERVE_TOKEN."
    ] = None
    triton_key_file: Annotated[
        Path | None,
        "Holds name=secret where Triton runs with --grpc-restricted-protocol=...:name=secret.",
    ] = None
    source_roots: Annotated[
        tuple[Path, ...],
        "Model folders are read only below these, whoever deploys them; empty: wherever this user "
        "may read.",
    ] = ()
    store_principal: Annotated[
        str | None,
        "Who this node is to object stores. Weights are reused only by nodes and agents of the "
        "same name. If not set, the access key's id or the role that the AWS settings name. Set "
        "it where credentials are given out for hours, by a machine's or container's role, else "
        "weights are fetched anew with each.",
    ] = None
    tier_bytes: Annotated[
        int | None,
        "Memory for weights of replicas that are gone, so that the next ones need not fetch them; "
        "0 keeps none. It is a part of memory_bytes and gives way to replicas at once. If not set, "
        "half of memory_bytes.",
    ] = None
    disk_dir: Annotated[
        Path | None,
        "On a local disk: weights that leave the memory stay here, for the next replicas and "
        "agents.",
    ] = None
    disk_bytes: Annotated[int, "What they may take of it, at most; 0 keeps none there."] = 0
    peer_listen: Annotated[
        str | None,
        "Where other agents read this node's weights, if not on a free port of listen's host.",
    ] = None
    advertise_peers: Annotated[
        str | None, "How other agents reach that address, if not as peer_listen says."
    ] = None
    peer_bytes_per_s: Annotated[
        float | None,
        "What all other agents together may read; 0 serves none. If not set, half of "
        "nic_bytes_per_s.",
    ] = None
    peer_connections: Annotated[int, "Reads of other agents at once."] = 8
    max_slots: Annotated[
        int,
        "Idle sets of runtime slots (processes that have imported everything) to keep ready on "
        "each device at most; 0: none. The scheduler says how many there are at a time.",
    ] = 1
    zone: Annotated[str, "Rack or zone of the node, for placement; empty: not said."] = ""
    fetch_threads: Annotated[int, "Connections per fetch."] = 4
    part_deadline_s: Annotated[
        float,
        "For a part whose request names no deadline: fetch and load together.",
    ] = 600.0
    remove_deadline_s: Annotated[
        float,
        "For a removal whose request names no deadline; then its processes are killed.",
    ] = 30.0
    failure_kept_s: Annotated[
        float,
        "How long a failed part stays in the reports if nobody removes it.",
    ] = 300.0
    watch_interval_s: Annotated[float, "How often processes and Triton are looked at."] = 0.5
    silence_s: Annotated[
        float,
        "A generate loop that does not turn for so long has hung: its process is killed, and its "
        "replica fails.",
    ] = 2.5

    def __post_init__(self) -> None:
        for key in _ADDRESSES:
            address: str | None = getattr(self, key)
            if address is not None:
                _require_address(key, address)
        if not self.run_dir.is_absolute() or not self.model_repository.is_absolute():
            raise InvalidRequest("run_dir and model_repository must be absolute paths.")
        if self.disk_bytes > 0 and not (self.disk_dir and self.disk_dir.is_absolute()):
            raise InvalidRequest("disk_bytes needs disk_dir, an absolute path.")
        if not all(root.is_absolute() for root in self.source_roots):
            raise InvalidRequest("source_roots must be absolute paths.")
        if not 0 < self.channel_port_start < self.channel_port_end <= 65536:
            raise InvalidRequest("channel_port_start must be below channel_port_end.")
        if not 0 < self.watch_interval_s <= self.silence_s:
            raise InvalidRequest("silence_s must not be below watch_interval_s, which is above 0.")
        if self.peer_connections < 1:
            raise InvalidRequest("peer_connections must be at least 1; peer_bytes_per_s: 0 is off.")

    @property
    def peer_rate_bytes_per_s(self) -> float:
        if self.peer_bytes_per_s is not None:
            return self.peer_bytes_per_s
        return self.nic_bytes_per_s / 2


def _require_address(key: str, address: str) -> None:
    try:
        split_address(address)
    except InvalidRequest:
        raise InvalidRequest(f"Setting '{key}' is {address!r}; write it as host:port.") from None
