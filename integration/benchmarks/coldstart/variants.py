"""What bench_coldstart compares: on which cluster, how deployed, from where the weights come.

Records only. All starts of one testbed in one round share a cluster that is fresh in that round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from integration.support.checkpoints import LlamaShape
from integration.support.plain_triton import Loader

#: Layers in bf16, cut evenly by 2, 4 and 8.
SHAPES = {
    "1gb": LlamaShape(layers=16, hidden=1792, intermediate=4352, heads=28, kv_heads=4, spread=0.02),
    "2gb": LlamaShape(layers=32, hidden=1792, intermediate=4352, heads=28, kv_heads=4, spread=0.02),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Testbed:
    name: str
    #: What reaches each node, Gbit/s.
    gbit: tuple[float, ...]
    agent_settings: Mapping[str, object] = field(default_factory=lambda: {"tier_bytes": 0})
    scheduler_settings: Mapping[str, object] = field(default_factory=dict)
    #: Idle sets of slots that each node has before a start.
    slots: int = 0


class Weights(StrEnum):
    """Where a start finds them."""

    STORE = "store"
    #: Of the nodes that start, where an earlier start has left them.
    MEMORY = "memory"
    DISK = "disk"
    #: Of another node's memory.
    PEER = "peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A start through gateway and scheduler."""

    stages: int
    weights: Weights = Weights.STORE
    #: The variant whose start has left the weights where this one finds them.
    after: str | None = None
    #: For policies that choose the number of stages by it.
    ttft_slo_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plain:
    """A model that node 1's Triton loads by itself."""

    loader: Loader


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    name: str
    label: str
    testbed: Testbed
    how: Deployed | Plain
    checkpoint: str = "2gb"

    @property
    def is_status_quo(self) -> bool:
        return isinstance(self.how, Plain) and self.how.loader is Loader.BOTO3

    @property
    def is_ours(self) -> bool:
        """What another system does is not, even where it runs on our code."""
        return isinstance(self.how, Deployed) and not self.testbed.scheduler_settings

    @property
    def weights(self) -> Weights:
        return self.how.weights if isinstance(self.how, Deployed) else Weights.STORE

    @property
    def nodes(self) -> int:
        return self.how.stages if isinstance(self.how, Deployed) else 1

    @property
    def source(self) -> str:
        """Prefix of its weights in the bucket."""
        return (isinstance(self.how, Deployed) and self.how.after) or self.name

    @property
    def fetching_gbit(self) -> tuple[float, ...]:
        """The links that its bytes come over, if they come from the store; fastest nodes first."""
        if isinstance(self.how, Plain):
            return self.testbed.gbit[:1]
        if self.weights is not Weights.STORE:
            return ()
        return tuple(sorted(self.testbed.gbit, reverse=True)[: self.how.stages])


_FOUR, _EIGHT, _MIXED = (1.0,) * 4, (0.5,) * 8, (1.0, 1.0, 0.5, 0.25)
_NO_SLOTS: Mapping[str, object] = {"tier_bytes": 0, "max_slots": 0}
#: One model of 2 GB stays in memory; starts from the store read a copy that nobody has read yet.
_KEEPING: Mapping[str, object] = {"tier_bytes": 2_200_000_000}
_STATUS_QUO = "boto3, then transformers"
#: Seconds within which HydraServe's rule needs four stages of 2 GB at 1 Gbit/s: 3 take 7.3 s.
_HYDRASERVE_SLO_S = 7.0

_PLAIN_4 = Testbed(name="4 × 1 Gbit/s", gbit=_FOUR, agent_settings=_NO_SLOTS)
_SLOTS_4 = Testbed(name="4 × 1 Gbit/s, slots", gbit=_FOUR, agent_settings=_KEEPING, slots=1)
_HYDRASERVE_4 = Testbed(
    name="4 × 1 Gbit/s, HydraServe's rules",
    gbit=_FOUR,
    agent_settings=_NO_SLOTS,
    scheduler_settings={"policy": {"name": "hydraserve"}},
)
_SERVERLESSLLM_4 = Testbed(
    name="4 × 1 Gbit/s, ServerlessLLM's rules",
    gbit=_FOUR,
    agent_settings={**_KEEPING, "max_slots": 0},
    scheduler_settings={"policy": {"name": "serverlessllm"}},
)
#: Of its own: what peers give differs from what the network can, and the scheduler measures that.
_PEERS_4 = Testbed(name="4 × 1 Gbit/s, slots, peers", gbit=_FOUR, agent_settings=_KEEPING, slots=1)
_DISK_4 = Testbed(
    name="4 × 1 Gbit/s, slots, disk tier",
    gbit=_FOUR,
    agent_settings={"tier_bytes": 0, "disk_bytes": 2_200_000_000},
    slots=1,
)
_PLAIN_8 = Testbed(name="8 × 0.5 Gbit/s", gbit=_EIGHT, agent_settings=_NO_SLOTS)
_SLOTS_8 = Testbed(name="8 × 0.5 Gbit/s, slots", gbit=_EIGHT, slots=1)
_SLOTS_MIXED = Testbed(name="1 + 1 + 0.5 + 0.25 Gbit/s, slots", gbit=_MIXED, slots=1)
#: The scheduler takes all links for equal: it is told so, and has measured none yet.
_SLOTS_MIXED_UNKNOWN = Testbed(
    name="1 + 1 + 0.5 + 0.25 Gbit/s, slots, equal split",
    gbit=_MIXED,
    agent_settings={"tier_bytes": 0, "nic_bytes_per_s": 1e8},
    slots=1,
)

VARIANTS: tuple[Variant, ...] = (
    Variant(name="status-quo", label=_STATUS_QUO, testbed=_PLAIN_4, how=Plain(loader=Loader.BOTO3)),
    Variant(
        name="status-quo-1gb",
        label=_STATUS_QUO,
        testbed=_PLAIN_4,
        how=Plain(loader=Loader.BOTO3),
        checkpoint="1gb",
    ),
    Variant(
        name="runai",
        label="Run:ai streamer, transformers",
        testbed=_PLAIN_4,
        how=Plain(loader=Loader.RUNAI),
    ),
    Variant(
        name="prefetch",
        label="status quo + prefetch",
        testbed=_PLAIN_4,
        how=Plain(loader=Loader.BOTO3_EARLY),
    ),
    Variant(
        name="streamed",
        label="our backend alone in a Triton",
        testbed=_PLAIN_4,
        how=Plain(loader=Loader.STANDALONE),
    ),
    *(
        Variant(
            name=f"ours-{stages}",
            label="ours without slots",
            testbed=_PLAIN_4,
            how=Deployed(stages=stages),
        )
        for stages in (1, 2, 3, 4)
    ),
    Variant(
        name="ours-4-1gb",
        label="ours without slots",
        testbed=_PLAIN_4,
        how=Deployed(stages=4),
        checkpoint="1gb",
    ),
    Variant(
        name="hydraserve-4",
        label="HydraServe's way",
        testbed=_HYDRASERVE_4,
        how=Deployed(stages=4, ttft_slo_s=_HYDRASERVE_SLO_S),
    ),
    Variant(
        name="serverlessllm",
        label="ServerlessLLM's way",
        testbed=_SERVERLESSLLM_4,
        how=Deployed(stages=1),
    ),
    Variant(
        name="serverlessllm-memory",
        label="ServerlessLLM's way",
        testbed=_SERVERLESSLLM_4,
        how=Deployed(stages=1, weights=Weights.MEMORY, after="serverlessllm"),
    ),
    Variant(name="ours-1-slots", label="ours with slots", testbed=_SLOTS_4, how=Deployed(stages=1)),
    Variant(
        name="memory-1-slots",
        label="ours with slots",
        testbed=_SLOTS_4,
        how=Deployed(stages=1, weights=Weights.MEMORY, after="ours-1-slots"),
    ),
    *(
        Variant(
            name=f"ours-{stages}-slots",
            label="ours with slots",
            testbed=_SLOTS_4,
            how=Deployed(stages=stages),
        )
        for stages in (2, 3, 4)
    ),
    Variant(
        name="memory-4-slots",
        label="ours with slots",
        testbed=_SLOTS_4,
        how=Deployed(stages=4, weights=Weights.MEMORY, after="ours-4-slots"),
    ),
    Variant(
        name="ours-4-slots-1gb",
        label="ours with slots",
        testbed=_SLOTS_4,
        how=Deployed(stages=4),
        checkpoint="1gb",
    ),
    Variant(
        name="memory-4-slots-1gb",
        label="ours with slots",
        testbed=_SLOTS_4,
        how=Deployed(stages=4, weights=Weights.MEMORY, after="ours-4-slots-1gb"),
        checkpoint="1gb",
    ),
    Variant(
        name="peer-1-slots-1gb",
        label="ours with slots",
        testbed=_PEERS_4,
        how=Deployed(stages=1, weights=Weights.PEER),
        checkpoint="1gb",
    ),
    Variant(
        name="disk-1-slots-1gb",
        label="ours with slots",
        testbed=_DISK_4,
        how=Deployed(stages=1, weights=Weights.DISK),
        checkpoint="1gb",
    ),
    Variant(
        name="status-quo-half", label=_STATUS_QUO, testbed=_PLAIN_8, how=Plain(loader=Loader.BOTO3)
    ),
    Variant(name="ours-8", label="ours without slots", testbed=_PLAIN_8, how=Deployed(stages=8)),
    Variant(name="ours-8-slots", label="ours with slots", testbed=_SLOTS_8, how=Deployed(stages=8)),
    Variant(
        name="mixed-slots", label="ours with slots", testbed=_SLOTS_MIXED, how=Deployed(stages=4)
    ),
    Variant(
        name="mixed-equal-slots",
        label="the same, equal split",
        testbed=_SLOTS_MIXED_UNKNOWN,
        how=Deployed(stages=4),
    ),
)
