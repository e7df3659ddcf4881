"""The plan of a replica: its stages, nodes, addresses, KV blocks and limits. Never changes.

What happens to the replica afterwards is in `state.records`.
"""

from __future__ import annotations

from dataclasses import dataclass

from paraserve_backend.architectures.spec import LayerRange
from paraserve_backend.protocol.names import EngineName, ReplicaModels, replica_id


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelAddress:
    """Where one model binds its end of the activation channel."""

    host: str
    port: int

    @property
    def url(self) -> str:
        return f"tcp://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StagePlan:
    layers: LayerRange
    node: str
    #: "cpu" or "cuda:<index>".
    device: str
    #: The node's `run_dir`, an absolute path there.
    run_dir: str
    weight_bytes: int
    kv_bytes: int
    #: Where hidden states reach this stage; `None` for stage 0, which Triton feeds.
    listen: ChannelAddress | None
    #: Of the small files, which every stage fetches beside its weights.
    file_bytes: int = 0

    @property
    def reserved_bytes(self) -> int:
        return self.weight_bytes + self.file_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlan:
    """One replica: stage 0 is the head, every node holds at most one stage."""

    deployment: str
    number: int
    stages: tuple[StagePlan, ...]
    #: KV blocks of `block_size` tokens, the same number on every stage.
    kv_blocks: int
    block_size: int
    max_context: int
    max_sequences: int
    max_batch_tokens: int
    forward_timeout_s: float
    #: Where sampled tokens come back to the head's link; `None` with one stage.
    results: ChannelAddress | None
    #: Where its head takes over requests of other replicas, and hears of those it hands over.
    hand_over: ChannelAddress
    #: The replica whose requests it takes over, if it was started for that.
    succeeds: str | None = None
    #: Its weights are fetched at low priority: nobody waits for it.
    background: bool = False
    #: Always our own where it is a pipeline.
    engine: EngineName = EngineName.PARASERVE

    @property
    def inbox_url(self) -> str:
        """Where KV blocks can be sent to it; empty where its engine takes none."""
        return self.hand_over.url if self.engine is EngineName.PARASERVE else ""

    @property
    def replica(self) -> str:
        return replica_id(self.deployment, self.number)

    @property
    def models(self) -> ReplicaModels:
        return ReplicaModels(self.replica)

    @property
    def head(self) -> StagePlan:
        return self.stages[0]

    def stage_on(self, node: str) -> int | None:
        """The index of the stage that `node` holds."""
        return next((i for i, stage in enumerate(self.stages) if stage.node == node), None)

    def ports_on(self, node: str) -> frozenset[int]:
        addresses = [stage.listen for stage in self.stages if stage.node == node]
        if self.head.node == node:
            addresses += [self.results, self.hand_over]
        return frozenset(address.port for address in addresses if address is not None)
