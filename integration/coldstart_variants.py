"""What bench_coldstart compares: on which cluster, how deployed, from where the weights come.

Records only. All starts of one testbed in one round share a cluster that is fresh in that round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from integration.checkpoints import LlamaShape
from integration.plain_triton import Loader

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
    #: Of another node.
    PEER = "peer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployed:
    """A start through gateway and scheduler."""

    stages: int
    weights: Weights = Weights.STORE
    #: The variant whose start has left the weights where this one finds them.
    after: str | None = None


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
        if self.how.weights is not Weights.STORE:
            return ()
        return tuple(sorted(self.testbed.gbit, reverse=True)[: self.how.stages])


_FOUR = (1.0,) * 4
_FOUR_NODES = Testbed(name="4 × 1 Gbit/s", gbit=_FOUR)
#: One model of 2 GB stays in memory; starts from the store read a copy that nobody has read yet.
_FOUR_KEEPING = Testbed(
    name="4 × 1 Gbit/s, memory tier", gbit=_FOUR, agent_settings={"tier_bytes": 2_200_000_000}
)
_EIGHT_NODES = Testbed(name="8 × 0.5 Gbit/s", gbit=(0.5,) * 8)
_MIXED_NODES = Testbed(name="1 + 1 + 0.5 + 0.25 Gbit/s", gbit=(1.0, 1.0, 0.5, 0.25))

VARIANTS: tuple[Variant, ...] = (
    Variant(
        name="status-quo",
        label="boto3 download, then transformers",
        testbed=_FOUR_NODES,
        how=Plain(loader=Loader.BOTO3),
    ),
    Variant(
        name="status-quo-1gb",
        label="the same",
        testbed=_FOUR_NODES,
        how=Plain(loader=Loader.BOTO3),
        checkpoint="1gb",
    ),
    Variant(
        name="runai",
        label="Run:ai streamer, then transformers",
        testbed=_FOUR_NODES,
        how=Plain(loader=Loader.RUNAI),
    ),
    Variant(
        name="prefetch",
        label="status quo + prefetch",
        testbed=_FOUR_NODES,
        how=Plain(loader=Loader.BOTO3_EARLY),
    ),
    Variant(
        name="streamed",
        label="our backend alone",
        testbed=_FOUR_NODES,
        how=Plain(loader=Loader.STANDALONE),
    ),
    *(
        Variant(
            name=f"ours-{stages}",
            label="ours, no slots",
            testbed=_FOUR_NODES,
            how=Deployed(stages=stages),
        )
        for stages in (1, 2, 3, 4)
    ),
    Variant(
        name="ours-4-1gb",
        label="ours, no slots",
        testbed=_FOUR_NODES,
        how=Deployed(stages=4),
        checkpoint="1gb",
    ),
    Variant(
        name="kept-1",
        label="ours, no slots",
        testbed=_FOUR_KEEPING,
        how=Deployed(stages=1),
    ),
    Variant(
        name="memory-1",
        label="from memory, no slots",
        testbed=_FOUR_KEEPING,
        how=Deployed(stages=1, weights=Weights.MEMORY, after="kept-1"),
    ),
    Variant(
        name="peer-1",
        label="from a peer, no slots",
        testbed=_FOUR_KEEPING,
        how=Deployed(stages=1, weights=Weights.PEER, after="kept-1"),
    ),
    Variant(
        name="status-quo-half",
        label="boto3 download, then transformers",
        testbed=_EIGHT_NODES,
        how=Plain(loader=Loader.BOTO3),
    ),
    Variant(
        name="ours-8",
        label="ours, no slots",
        testbed=_EIGHT_NODES,
        how=Deployed(stages=8),
    ),
    Variant(
        name="mixed",
        label="ours, no slots",
        testbed=_MIXED_NODES,
        how=Deployed(stages=4),
    ),
)
