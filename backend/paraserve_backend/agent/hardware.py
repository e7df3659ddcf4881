"""What this node offers, as its agent tells the scheduler: addresses, memory, network, devices."""

from __future__ import annotations

from pathlib import Path

from paraserve_backend.agent.config import AgentConfig
from paraserve_backend.errors import InvalidRequest
from paraserve_backend.machine.devices import find_devices, hardware_kind
from paraserve_backend.machine.memory import available_bytes
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.addresses import split_address, with_port

#: The rest is left to Triton, the agent and the Python processes themselves.
_MEMORY_SHARE = 0.8
_ANY_HOST = ("0.0.0.0", "::")


def node_info(config: AgentConfig, bound_port: int, *, proc: Path, dev: Path) -> pb.NodeInfo:
    """Describe this node; `bound_port` is what `config.listen` became.

    Raises:
        InvalidRequest: the agent listens on all addresses and `advertise` does not say which one
            others should use.
    """
    return pb.NodeInfo(
        name=config.name,
        agent_address=config.advertise or _own_address(config.listen, bound_port),
        triton_grpc_address=config.advertise_triton or config.triton,
        memory_bytes=config.memory_bytes or usable_bytes(proc),
        nic_bytes_per_s=config.nic_bytes_per_s,
        run_dir=str(config.run_dir),
        channel_host=config.channel_host,
        channel_port_start=config.channel_port_start,
        channel_port_end=config.channel_port_end,
        devices=devices_of(config, dev),
        max_slots=config.max_slots,
        kind=hardware_kind(proc),
        zone=config.zone,
    )


def usable_bytes(proc: Path, tier_bytes: int = 0) -> int:
    """Return what replicas may use: the tier's `tier_bytes` give way to them."""
    return int((available_bytes(proc) + tier_bytes) * _MEMORY_SHARE)


def devices_of(config: AgentConfig, dev: Path) -> tuple[str, ...]:
    """Return what models of this node may compute on."""
    return config.devices or find_devices(dev)


def _own_address(listen: str, bound_port: int) -> str:
    if split_address(listen)[0] in _ANY_HOST:
        raise InvalidRequest(
            f"The agent listens on {listen}: set 'advertise' to the host:port others should use."
        )
    return with_port(listen, bound_port)
