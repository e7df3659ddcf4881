"""Lays a replica out on chosen nodes: ports, memory, KV blocks; or says what is missing. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.architectures.tensors import kv_bytes_per_token
from paraserve_backend.errors import InsufficientCapacity
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.weights.checkpoint.stages import split_layers, stage_tensors
from paraserve_scheduler.reconciler.config import PlacementConfig
from paraserve_scheduler.reconciler.per_deployment import kept_per_deployment
from paraserve_scheduler.state.plans import ChannelAddress, ReplicaPlan, StagePlan
from paraserve_scheduler.state.spec import Deployment

#: Channel ports of a node that any stage can do with: a head binds one for hand-overs, that of a
#: pipeline another for results, every other stage one.
LEAST_PORTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpace:
    """What one node can give to a new replica."""

    name: str
    #: "cpu" or "cuda:<index>".
    device: str
    run_dir: str
    channel_host: str
    #: Channel ports that no replica uses, lowest first.
    free_ports: tuple[int, ...]
    free_bytes: int
    #: What a new fetch to this node would get.
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """The layers of one stage, the bytes of their weights, of small files and of one KV block."""

    layers: LayerRange
    weight_bytes: int
    file_bytes: int
    kv_block_bytes: int

    @property
    def fetched_bytes(self) -> int:
        return self.weight_bytes + self.file_bytes

    def needs(self, kv_blocks: int) -> int:
        return self.fetched_bytes + kv_blocks * self.kv_block_bytes


def lay_out(
    deployment: Deployment,
    number: int,
    stages: Sequence[tuple[LayerRange, NodeSpace]],
    config: PlacementConfig,
) -> ReplicaPlan:
    """Plan replica `number` with these stages; the first is the head.

    Raises:
        InsufficientCapacity: a node has no room for its stage with one context's KV cache.
    """
    needed = least_kv_blocks(deployment, config)
    shares = tuple(_share(deployment, layers, config.kv_block_size) for layers, _ in stages)
    nodes = tuple(node for _, node in stages)
    for share, node in zip(shares, nodes, strict=True):
        if share.needs(needed) > node.free_bytes or len(node.free_ports) < LEAST_PORTS:
            raise InsufficientCapacity(_stage_shortage(deployment, share.needs(needed), node))
    return _plan(deployment, number, shares, nodes, needed, config)


def check_room(deployment: Deployment, nodes: Sequence[NodeSpace], config: PlacementConfig) -> None:
    """Check that the model, cut into equal stages, has room on some of `nodes`.

    Raises:
        InsufficientCapacity: no number of stages fits; the message says how much is missing.
    """
    needed = least_kv_blocks(deployment, config)
    for stages in range(1, _max_stages(deployment, len(nodes), config) + 1):
        if _has_room(equal_split(deployment, stages, config.kv_block_size), nodes, needed):
            return
    raise InsufficientCapacity(_shortage(deployment, nodes, needed, config))


def place_successor(
    deployment: Deployment,
    number: int,
    predecessor: ReplicaPlan,
    node: NodeSpace,
    config: PlacementConfig,
) -> ReplicaPlan:
    """Plan replica `number`, all of it on `node`, to take over any request of `predecessor`.

    Raises:
        InsufficientCapacity: the message says how much is missing on the node.
    """
    shares = equal_split(deployment, 1, config.kv_block_size)
    longest = _blocks(predecessor.max_context, config.kv_block_size)
    needed = max(least_kv_blocks(deployment, config), longest)
    if not _has_room(shares, [node], needed):
        raise InsufficientCapacity(_stage_shortage(deployment, shares[0].needs(needed), node))
    plan = _plan(deployment, number, shares, (node,), needed, config)
    return replace(plan, succeeds=predecessor.replica)


@kept_per_deployment
def equal_split(deployment: Deployment, stages: int, block_size: int) -> tuple[Share, ...]:
    """Cut the model into stages of as equal bytes as whole layers allow."""
    model = deployment.model
    ranges = split_layers(
        deployment.index,
        model.names,
        tied=model.tie_word_embeddings,
        num_layers=model.num_layers,
        stages=stages,
    )
    return tuple(_share(deployment, layers, block_size) for layers in ranges)


@kept_per_deployment
def _share(deployment: Deployment, layers: LayerRange, block_size: int) -> Share:
    model = deployment.model
    tensors = stage_tensors(
        deployment.index, model.names, tied=model.tie_word_embeddings, layers=layers
    )
    return Share(
        layers=layers,
        weight_bytes=sum(tensor.size_bytes for tensor in tensors),
        file_bytes=deployment.index.file_bytes,
        kv_block_bytes=block_size * kv_bytes_per_token(model, layers),
    )


def _max_stages(deployment: Deployment, num_nodes: int, config: PlacementConfig) -> int:
    limit = deployment.spec.max_stages or config.max_stages
    return min(limit, num_nodes, deployment.model.num_layers)


def least_kv_blocks(deployment: Deployment, config: PlacementConfig) -> int:
    """The least KV blocks a replica is of use with: one context of the length stated."""
    context = deployment.context_limit
    if deployment.spec.max_context is None:
        context = min(context, config.min_context)
    return _blocks(context, config.kv_block_size)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _has_room(shares: Sequence[Share], nodes: Sequence[NodeSpace], kv_blocks: int) -> bool:
    """Whether there are enough nodes each of which can hold any of the shares."""
    largest = max(share.needs(kv_blocks) for share in shares)
    able = [
        node for node in nodes if node.free_bytes >= largest and len(node.free_ports) >= LEAST_PORTS
    ]
    return len(able) >= len(shares)


def _plan(
    deployment: Deployment,
    number: int,
    shares: Sequence[Share],
    nodes: Sequence[NodeSpace],
    needed: int,
    config: PlacementConfig,
) -> ReplicaPlan:
    kv_blocks = max(needed, _wanted_blocks(deployment, shares, nodes, needed, config))
    context = min(deployment.context_limit, kv_blocks * config.kv_block_size)
    is_pipeline = len(nodes) > 1
    return ReplicaPlan(
        deployment=deployment.name,
        number=number,
        stages=tuple(
            _stage(share, node, kv_blocks) for share, node in zip(shares, nodes, strict=True)
        ),
        kv_blocks=kv_blocks,
        block_size=config.kv_block_size,
        max_context=context,
        max_sequences=deployment.spec.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        forward_timeout_s=config.forward_timeout_s,
        results=_address(nodes[0], 1) if is_pipeline else None,
        hand_over=_address(nodes[0], 0),
        engine=EngineName.PARASERVE if is_pipeline else deployment.spec.engine,
    )


def _stage(share: Share, node: NodeSpace, kv_blocks: int) -> StagePlan:
    return StagePlan(
        layers=share.layers,
        node=node.name,
        device=node.device,
        run_dir=node.run_dir,
        weight_bytes=share.weight_bytes,
        file_bytes=share.file_bytes,
        kv_bytes=kv_blocks * share.kv_block_bytes,
        listen=None if share.layers.is_first else _address(node, 0),
    )


def _address(node: NodeSpace, number: int) -> ChannelAddress:
    return ChannelAddress(host=node.channel_host, port=node.free_ports[number])


def _wanted_blocks(
    deployment: Deployment,
    shares: Sequence[Share],
    nodes: Sequence[NodeSpace],
    needed: int,
    config: PlacementConfig,
) -> int:
    """What all sequences may need, as far as every stage's node has room for it."""
    per_sequence = _blocks(deployment.context_limit, config.kv_block_size)
    wanted = per_sequence * deployment.spec.max_sequences
    rooms = [
        int((node.free_bytes - share.fetched_bytes) * config.kv_share) // share.kv_block_bytes
        for share, node in zip(shares, nodes, strict=True)
    ]
    if deployment.spec.consolidate and len(nodes) > 1:
        beside_successor = _room_beside_successor(deployment, shares[0], nodes[0], config)
        # A head that has no room for a successor in any case need not keep any.
        rooms += [beside_successor] if beside_successor >= needed else []
    return min(wanted, *rooms)


def _room_beside_successor(
    deployment: Deployment, share: Share, head: NodeSpace, config: PlacementConfig
) -> int:
    """How many blocks leave the head room for the whole model with as many blocks."""
    (whole,) = equal_split(deployment, 1, config.kv_block_size)
    shared_bytes = share.weight_bytes if head.device == "cpu" else 0
    left_bytes = head.free_bytes - share.fetched_bytes - whole.fetched_bytes + shared_bytes
    both = whole.kv_block_bytes + config.kv_share * share.kv_block_bytes
    return int(left_bytes * config.kv_share / both)


def _shortage(
    deployment: Deployment, nodes: Sequence[NodeSpace], kv_blocks: int, config: PlacementConfig
) -> str:
    """Say what the deployment needs and how much of it is missing."""
    if not nodes:
        device = deployment.spec.device or "cpu or cuda"
        return f"'{deployment.name}' cannot be placed: no live node with device {device}."
    stages = _max_stages(deployment, len(nodes), config)
    shares = equal_split(deployment, stages, config.kv_block_size)
    needs = sorted((share.needs(kv_blocks) for share in shares), reverse=True)
    free = sorted((node.free_bytes for node in nodes), reverse=True)[:stages]
    missing = sum(max(0, need - has) for need, has in zip(needs, free, strict=True))
    if missing == 0:
        return f"'{deployment.name}' cannot be placed: its nodes have no channel port left."
    return (
        f"'{deployment.name}' needs {_size(sum(needs))} in {stages} equal stages, but the "
        f"{stages} live nodes with most room have {_size(sum(free))} free: "
        f"{_size(missing)} are missing."
    )


def _stage_shortage(deployment: Deployment, needed_bytes: int, node: NodeSpace) -> str:
    missing = needed_bytes - node.free_bytes
    if missing <= 0:
        return f"Node {node.name} has no channel port left."
    return (
        f"'{deployment.name}' needs {_size(needed_bytes)} on node {node.name}, "
        f"which has {_size(max(0, node.free_bytes))} free: {_size(missing)} are missing."
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
