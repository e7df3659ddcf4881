"""What a deployment is and how one replica of it is laid out: immutable once made.

Pure records. What happens to a replica afterwards is `paraserve_scheduler.state.view`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from paraserve_backend.architectures.spec import LayerRange, ModelSpec
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.weights.checkpoint.index import CheckpointIndex


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """What the user asked for, validated and with defaults filled in."""

    name: str
    source: str
    endpoint_url: str | None = None
    region: str | None = None
    #: Objectives; `None` where the user stated none.
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    #: Idle time after which a replica goes; `None`: when it is no longer worth its memory.
    keep_alive_s: float | None = None
    #: Replicas that are kept without any request, and that there may be.
    min_replicas: int = 0
    max_replicas: int = 1
    #: Of two deployments that lack memory the higher one gets it.
    priority: int = 0
    #: Requests that each gateway holds for a replica; one more is refused.
    max_waiting: int = 1000
    #: `None`: as many as there are nodes.
    max_stages: int | None = None
    #: Tokens; `None`: the model's own limit, as far as memory goes.
    max_context: int | None = None
    max_sequences: int
    #: "cpu" or "cuda"; `None`: what the node has.
    device: str | None = None
    #: Whether its pipelines become full instances.
    consolidate: bool = True
    #: Of its full instances.
    engine: EngineName = EngineName.PARASERVE


# Compared and hashed by identity: one exists per deployed checkpoint, and its index is large.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Deployment:
    spec: DeploymentSpec
    model: ModelSpec
    index: CheckpointIndex

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelKeys:
    """CURVE key pair of a deployment, Z85: all stages of all its replicas have it."""

    public_key: str
    secret_key: str = field(repr=False)


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

    @property
    def reserved_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    @property
    def is_whole(self) -> bool:
        """Whether it holds the whole model."""
        return self.layers.is_first and self.layers.is_last


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
        return f"{self.deployment}.{self.number}"

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
