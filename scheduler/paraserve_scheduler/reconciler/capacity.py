"""Which nodes a deployment may use, what they have free, and when a node counts as lost. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from paraserve_scheduler.reconciler.placement import NodeSpace
from paraserve_scheduler.reconciler.turn import Turn
from paraserve_scheduler.state.records import NodeState, Replica
from paraserve_scheduler.state.spec import DeploymentSpec
from paraserve_scheduler.state.view import ClusterView


def is_alive(turn: Turn, node: NodeState) -> bool:
    return _silent_s(turn, node) <= turn.config.node_timeout_s


def _silent_s(turn: Turn, node: NodeState) -> float:
    return turn.now_s - max(node.last_seen_s, turn.view.listening_since_s)


def node_spaces(turn: Turn, spec: DeploymentSpec) -> tuple[NodeSpace, ...]:
    """What every node that could take a stage of this deployment has to give, by name."""
    return tuple(
        _space(turn.view, node, device)
        for _, node in sorted(turn.view.nodes.items())
        if is_usable(turn, node) and (device := device_of(node, spec.device)) is not None
    )


def space_on(view: ClusterView, name: str, spec: DeploymentSpec) -> NodeSpace:
    """The same of the node `name`, which is one of them."""
    node = view.nodes[name]
    device = device_of(node, spec.device)
    assert device is not None, "plans are made of nodes with the device"
    return _space(view, node, device)


def is_usable(turn: Turn, node: NodeState) -> bool:
    """Whether a node may get new replicas."""
    return (
        node.info.name not in turn.view.cordoned
        and is_alive(turn, node)
        and bool(node.triton_live)
        # What no replica wants still takes memory, nobody knows how much.
        and not turn.view.orphans(node)
    )


def free_ports(view: ClusterView, node: NodeState) -> tuple[int, ...]:
    """Channel ports of a node that no replica uses, lowest first."""
    used = view.used_ports(node.info.name)
    return tuple(port for port in range(*node.info.channel_ports) if port not in used)


def successor_spaces(turn: Turn, replica: Replica) -> Mapping[str, NodeSpace]:
    """What every node has to give to a successor of `replica`, which shares its weights there."""
    spec = turn.view.deployments[replica.deployment].deployment.spec
    spaces = node_spaces(turn, spec)
    return {space.name: _shared(turn.view, replica, space) for space in spaces}


def node_trouble(turn: Turn, name: str) -> str | None:
    """Why nothing on the node `name` can be relied on, if so."""
    node = turn.view.nodes.get(name)
    if node is None:
        silent_s = turn.now_s - turn.view.listening_since_s
        lost = silent_s > turn.config.recovery_grace_s
        return f"Node {name} has not registered for {silent_s:.1f} s." if lost else None
    if not is_alive(turn, node):
        return f"Node {name} was lost: silent for {_silent_s(turn, node):.1f} s."
    if node.triton_live is False:
        return f"Triton on node {name} does not answer."
    return None


def _shared(view: ClusterView, replica: Replica, space: NodeSpace) -> NodeSpace:
    # Weights can be shared once only.
    if view.is_shared(replica, space.name):
        return space
    shared_bytes = view.host_bytes(replica, space.name)
    return replace(space, free_bytes=space.free_bytes + shared_bytes)


def device_of(node: NodeState, wanted: str | None) -> str | None:
    """The node's device of the wanted kind; with no wish, its first GPU before its CPU."""
    kinds = [wanted] if wanted else ["cuda", "cpu"]
    for kind in kinds:
        for device in node.info.devices:
            if device.partition(":")[0] == kind:
                return device
    return None


def _space(view: ClusterView, node: NodeState, device: str) -> NodeSpace:
    info = node.info
    return NodeSpace(
        name=info.name,
        device=device,
        run_dir=info.run_dir,
        channel_host=info.channel_host,
        free_ports=free_ports(view, node),
        free_bytes=info.memory_bytes - view.reserved_bytes(info.name),
        # Fetches share a node's bandwidth evenly.
        bytes_per_s=info.nic_bytes_per_s / (1 + view.running_fetches(info.name)),
    )
