"""Settings of the reconciler: the policy's name, time limits, placement, consolidation."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementConfig:
    """How replicas are cut and what they take."""

    kv_block_size: int = 16
    #: A replica takes at most this part of what is free on a node after its weights, so that the
    #: first deployment does not fill the node with KV cache; one full context always fits.
    kv_share: float = 0.5
    #: Least tokens of KV cache where the user stated no context length.
    min_context: int = 256
    max_batch_tokens: int = 512
    forward_timeout_s: float = 30.0
    #: Until a cold start has shown it: how long a process takes until it can take in weights, and
    #: what comes after them until the replica serves.
    runtime_s: float = 2.0
    tail_s: float = 0.5
    #: What a node reads of weights from its disk.
    disk_bytes_per_s: float = 1.5e9
    #: Most stages of a replica whose user states no number.
    max_stages: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsolidationConfig:
    """When a pipeline becomes one full instance, or several."""

    #: How long it serves as a pipeline at least.
    after_s: float = 2.0
    #: It becomes several while there are more requests than so many times what one runs at once.
    #: Those still starting are given up when there are no more than half as many.
    scale_up_load: float = 1.0
    #: Pause after a successor that failed; it doubles each time.
    retry_s: float = 10.0
    #: Pause after a command to hand over that did not arrive.
    hand_over_retry_s: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """When replicas start and stop."""

    #: Who decides what starts and stops: a name that `paraserve simulate --policy` knows.
    name: str = "paraserve"
    #: A node that was silent for so long is lost.
    node_timeout_s: float = 5.0
    #: How long after its own start the scheduler waits for nodes to register again.
    recovery_grace_s: float = 15.0
    #: A gateway that was silent for so long has no requests any more; it reports every second.
    gateway_timeout_s: float = 5.0
    #: Longest time for a replica to become ready.
    start_timeout_s: float = 900.0
    #: Starts that may fail within `failure_window_s` before waiting requests are failed.
    max_failed_starts: int = 3
    failure_window_s: float = 60.0
    #: Replicas that may die within `death_window_s`, not by a node's fault, before the next start
    #: waits `death_pause_s`; the pause doubles with each further one until none has died for so
    #: long. So does the pause after starts that fail, which begins with `node_timeout_s`.
    max_deaths: int = 5
    death_window_s: float = 300.0
    death_pause_s: float = 10.0
    most_pause_s: float = 300.0
    #: How long requests are failed at once after a start that could only fail again.
    repair_pause_s: float = 5.0
    #: How long requests wait for nodes with room before they are failed.
    capacity_grace_s: float = 10.0
    #: How long after a route was withdrawn a gateway may still send a request along it.
    settle_s: float = 1.5
    #: Longest time for running requests to end before their replica is removed.
    drain_grace_s: float = 30.0
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    consolidation: ConsolidationConfig = field(default_factory=ConsolidationConfig)
