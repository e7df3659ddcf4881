"""Where a replica goes: how many stages, which layers, which nodes, how much KV cache. Pure.

Version 1: equal stages over the nodes with the most free bandwidth. As many stages as fit, or the
fewest whose predicted cold start meets the TTFT objective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from paraserve_backend.contract import EngineName, LayerRange
from paraserve_backend.errors import InsufficientCapacity
from paraserve_backend.families.tensors import kv_bytes_per_token
from paraserve_backend.weights.plan import split_layers, stage_tensors
from paraserve_scheduler.config import PlacementConfig
from paraserve_scheduler.plans import ChannelAddress, Deployment, ReplicaPlan, StagePlan


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
    """The layers of one stage, the bytes of their weights and of one KV block."""

    layers: LayerRange
    weight_bytes: int
    kv_block_bytes: int

    def needs(self, kv_blocks: int) -> int:
        return self.weight_bytes + kv_blocks * self.kv_block_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Option:
    """One way to place a replica: a node for every share."""

    shares: tuple[Share, ...]
    nodes: tuple[NodeSpace, ...]

    def fetch_s(self) -> float:
        """Predicted time until the last stage's weights are there."""
        return max(
            share.weight_bytes / node.bytes_per_s
            for share, node in zip(self.shares, self.nodes, strict=True)
        )


def place(
    deployment: Deployment, number: int, nodes: Sequence[NodeSpace], config: PlacementConfig
) -> ReplicaPlan:
    """Plan replica `number` of `deployment` on some of `nodes`.

    Raises:
        InsufficientCapacity: no number of stages fits; the message says how much is missing.
    """
    needed = _needed_blocks(deployment, config)
    options = [
        _Option(shares=shares, nodes=chosen)
        for stages in range(1, _max_stages(deployment, len(nodes)) + 1)
        if (shares := equal_split(deployment, stages, config.kv_block_size))
        and (chosen := _choose_nodes(shares, nodes, needed))
    ]
    if not options:
        raise InsufficientCapacity(_shortage(deployment, nodes, needed, config))
    option = _choose_option(options, deployment.spec.ttft_slo_s, config)
    return _plan(deployment, number, option, needed, config)


def place_successor(
    deployment: Deployment,
    number: int,
    succeeds: ReplicaPlan,
    node: NodeSpace,
    config: PlacementConfig,
) -> ReplicaPlan:
    """Plan replica `number`, all of it on `node`, to take over any request of `succeeds`.

    Raises:
        InsufficientCapacity: the message says how much is missing on the node.
    """
    shares = equal_split(deployment, 1, config.kv_block_size)
    longest = _blocks(succeeds.max_context, config.kv_block_size)
    needed = max(_needed_blocks(deployment, config), longest)
    if not _choose_nodes(shares, [node], needed):
        raise InsufficientCapacity(_successor_shortage(succeeds, shares[0].needs(needed), node))
    option = _Option(shares=shares, nodes=(node,))
    plan = _plan(deployment, number, option, needed, config)
    return replace(plan, succeeds=succeeds.replica)


@lru_cache(maxsize=1024)
def equal_split(deployment: Deployment, stages: int, block_size: int) -> tuple[Share, ...]:
    """Cut the model into stages of as equal bytes as whole layers allow."""
    model, index = deployment.model, deployment.index
    tied = model.tie_word_embeddings
    ranges = split_layers(index, model.names, tied=tied, num_layers=model.num_layers, stages=stages)
    return tuple(
        Share(
            layers=layers,
            weight_bytes=sum(
                tensor.size_bytes
                for tensor in stage_tensors(index, model.names, tied=tied, layers=layers)
            ),
            kv_block_bytes=block_size * kv_bytes_per_token(model, layers),
        )
        for layers in ranges
    )


def _max_stages(deployment: Deployment, num_nodes: int) -> int:
    limit = deployment.spec.max_stages or num_nodes
    return min(limit, num_nodes, deployment.model.num_layers)


def _needed_blocks(deployment: Deployment, config: PlacementConfig) -> int:
    """The least KV blocks a replica is of use with: one context of the length stated."""
    context = _context_limit(deployment)
    if deployment.spec.max_context is None:
        context = min(context, config.min_context)
    return _blocks(context, config.kv_block_size)


def _context_limit(deployment: Deployment) -> int:
    model_limit = deployment.model.context_length
    return min(deployment.spec.max_context or model_limit, model_limit)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _choose_nodes(
    shares: Sequence[Share], nodes: Sequence[NodeSpace], kv_blocks: int
) -> tuple[NodeSpace, ...] | None:
    """The best nodes that can each hold any of the shares, or `None` if they are too few."""
    largest = max(share.needs(kv_blocks) for share in shares)
    # A head binds one for hand-overs, that of a pipeline another for results. The other stages
    # need one, but any of the nodes may become the head.
    ports = 2 if len(shares) > 1 else 1
    able = [node for node in nodes if node.free_bytes >= largest and len(node.free_ports) >= ports]
    if len(able) < len(shares):
        return None
    able.sort(key=lambda node: (-node.bytes_per_s, -node.free_bytes, node.name))
    chosen = able[: len(shares)]
    # The head should have room to take in the other stages later.
    head = max(chosen, key=lambda node: node.free_bytes)
    return (head, *(node for node in chosen if node is not head))


def _choose_option(
    options: Sequence[_Option], ttft_slo_s: float | None, config: PlacementConfig
) -> _Option:
    """The fewest stages that meet the objective, else the fastest start."""
    if ttft_slo_s is not None:
        for option in options:
            if option.fetch_s() + config.cold_start_floor_s <= ttft_slo_s:
                return option
    return options[-1]


def _plan(
    deployment: Deployment, number: int, option: _Option, needed: int, config: PlacementConfig
) -> ReplicaPlan:
    kv_blocks = max(needed, _wanted_blocks(deployment, option, needed, config))
    context = min(_context_limit(deployment), kv_blocks * config.kv_block_size)
    is_pipeline = len(option.nodes) > 1
    return ReplicaPlan(
        deployment=deployment.name,
        number=number,
        stages=tuple(
            _stage(share, node, kv_blocks)
            for share, node in zip(option.shares, option.nodes, strict=True)
        ),
        kv_blocks=kv_blocks,
        block_size=config.kv_block_size,
        max_context=context,
        max_sequences=deployment.spec.max_sequences,
        max_batch_tokens=config.max_batch_tokens,
        forward_timeout_s=config.forward_timeout_s,
        results=_address(option.nodes[0], 1) if is_pipeline else None,
        hand_over=_address(option.nodes[0], 0),
        engine=EngineName.PARASERVE if is_pipeline else deployment.spec.engine,
    )


def _stage(share: Share, node: NodeSpace, kv_blocks: int) -> StagePlan:
    return StagePlan(
        layers=share.layers,
        node=node.name,
        device=node.device,
        run_dir=node.run_dir,
        weight_bytes=share.weight_bytes,
        kv_bytes=kv_blocks * share.kv_block_bytes,
        listen=None if share.layers.is_first else _address(node, 0),
    )


def _address(node: NodeSpace, number: int) -> ChannelAddress:
    return ChannelAddress(host=node.channel_host, port=node.free_ports[number])


def _wanted_blocks(
    deployment: Deployment, option: _Option, needed: int, config: PlacementConfig
) -> int:
    """What all sequences may need, as far as every stage's node has room for it."""
    per_sequence = _blocks(_context_limit(deployment), config.kv_block_size)
    wanted = per_sequence * deployment.spec.max_sequences
    rooms = [
        int((node.free_bytes - share.weight_bytes) * config.kv_share) // share.kv_block_bytes
        for share, node in zip(option.shares, option.nodes, strict=True)
    ]
    if deployment.spec.consolidate and len(option.nodes) > 1:
        beside_successor = _room_beside_successor(deployment, option, config)
        # A head that has no room for a successor in any case need not keep any.
        rooms += [beside_successor] if beside_successor >= needed else []
    return min(wanted, *rooms)


def _room_beside_successor(deployment: Deployment, option: _Option, config: PlacementConfig) -> int:
    """How many blocks leave the head room for the whole model with as many blocks."""
    (whole,) = equal_split(deployment, 1, config.kv_block_size)
    share, head = option.shares[0], option.nodes[0]
    shared_bytes = share.weight_bytes if head.device == "cpu" else 0
    left_bytes = head.free_bytes - share.weight_bytes - whole.weight_bytes + shared_bytes
    both = whole.kv_block_bytes + config.kv_share * share.kv_block_bytes
    return int(left_bytes * config.kv_share / both)


def _shortage(
    deployment: Deployment, nodes: Sequence[NodeSpace], kv_blocks: int, config: PlacementConfig
) -> str:
    """Say what the deployment needs and how much of it is missing."""
    if not nodes:
        device = deployment.spec.device or "cpu or cuda"
        return f"'{deployment.name}' cannot be placed: no live node with device {device}."
    stages = _max_stages(deployment, len(nodes))
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


def _successor_shortage(succeeds: ReplicaPlan, needed_bytes: int, node: NodeSpace) -> str:
    missing = needed_bytes - node.free_bytes
    if missing <= 0:
        return f"Node {node.name} has no channel port left."
    return (
        f"'{succeeds.deployment}' needs {_size(needed_bytes)} to be whole on node {node.name}, "
        f"which has {_size(max(0, node.free_bytes))} free: {_size(missing)} are missing."
    )


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.1f} MB"
