"""What a run leaves behind; `summary` makes figures of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paraserve_scheduler.simulator.trace import Trace
from paraserve_scheduler.simulator.workload import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """One start as it was predicted and as it went."""

    replica: str
    stages: int
    predicted_s: float | None
    actual_s: float


@dataclass(slots=True, kw_only=True)
class Outcome:
    requests: Sequence[Request]
    cold_starts: list[ColdStart] = field(default_factory=list)
    gpu_byte_s: float = 0.0
    #: Over the network, into nodes.
    moved_bytes: float = 0.0
    #: Replicas that ended with a node.
    lost_replicas: int = 0
    decisions: int = 0
    ended_s: float = 0.0
    trace: Trace = field(default_factory=Trace)
