"""What users asked for: a deployment's settings, its model and index, and its key pair."""

from __future__ import annotations

from dataclasses import dataclass, field

from paraserve_backend.architectures.spec import ModelSpec
from paraserve_backend.protocol.names import EngineName
from paraserve_backend.weights.checkpoint.index import CheckpointIndex
from paraserve_scheduler.state.waiting import MAX_WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentSpec:
    """What the user asked for, validated and with defaults filled in.

    `pb.DeploymentSpec` has the same fields by the same names, and each is copied by its name.
    """

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
    max_waiting: int = MAX_WAITING
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
@dataclass(frozen=True, slots=True, weakref_slot=True, kw_only=True, eq=False)
class Deployment:
    spec: DeploymentSpec
    model: ModelSpec
    index: CheckpointIndex
    #: Bytes of a prompt that one token stands for at most; 0: not known.
    longest_token_bytes: int = 0

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def context_limit(self) -> int:
        """Tokens of the longest context that a replica may have, as far as memory goes."""
        model_limit = self.model.context_length
        return min(self.spec.max_context or model_limit, model_limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelKeys:
    """CURVE key pair of a deployment, Z85: all stages of all its replicas have it."""

    public_key: str
    secret_key: str = field(repr=False)
