"""Constants of the cluster's nodes as their cold starts show them. Pure.

A kind of node is corrected by every cold start that ends on one: a new measurement counts a third.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from paraserve_backend.telemetry.spans import Span

#: What a new measurement counts beside all before it.
_WEIGHT = 1 / 3
#: Fetches below this say more about latency than about bandwidth.
_LEAST_BYTES = 50_000_000
#: Spans of a stage's role (roles/engine.py) and of the agent (agent/part.py).
_TAKES_IN = "adopt weights"
_FETCH = "fetch"
_FROM_SLOT = "bind "
_FROM_ELSEWHERE = "fetch from "


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTimes:
    """One stage's cold start as it went, in seconds after its node began; None: not known."""

    runtime_s: float | None
    fetch_s: float | None
    ready_s: float | None
    used_slot: bool
    fetched_bytes: int
    #: None of them came from a peer, a disk or host memory.
    is_from_store: bool = True

    @property
    def bytes_per_s(self) -> float | None:
        """How fast its fetch was, where that says something about the node's network."""
        if not self.fetch_s or self.fetched_bytes < _LEAST_BYTES or not self.is_from_store:
            return None
        return self.fetched_bytes / self.fetch_s


def stage_times(spans: Iterable[Span], fetched_bytes: int) -> StageTimes:
    """Read a part's spans; only differences on one node's clock count."""
    ended = [span for span in spans if span.end_s > 0]
    begin_s = min((span.start_s for span in ended), default=0.0)
    takes_in = [span.start_s - begin_s for span in ended if span.name == _TAKES_IN]
    fetches = [span.end_s - begin_s for span in ended if span.name == _FETCH]
    return StageTimes(
        runtime_s=max(takes_in, default=None),
        fetch_s=max(fetches, default=None),
        ready_s=max((span.end_s - begin_s for span in ended), default=None),
        used_slot=any(span.name.startswith(_FROM_SLOT) for span in ended),
        fetched_bytes=fetched_bytes,
        is_from_store=not any(span.name.startswith(_FROM_ELSEWHERE) for span in ended),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Of one kind of node; None: not measured yet."""

    runtime_s: float | None = None
    slot_runtime_s: float | None = None
    #: From the last of bytes and process to a replica that serves, the scheduler's part included.
    tail_s: float | None = None
    #: Of predicted time per token, what it really was.
    decode_ratio: float | None = None

    def with_runtime(self, seconds: float, *, used_slot: bool) -> Calibration:
        if used_slot:
            return replace(self, slot_runtime_s=blend(self.slot_runtime_s, seconds))
        return replace(self, runtime_s=blend(self.runtime_s, seconds))

    def with_tail(self, seconds: float) -> Calibration:
        return replace(self, tail_s=blend(self.tail_s, seconds))

    def with_decode_ratio(self, ratio: float) -> Calibration:
        return replace(self, decode_ratio=blend(self.decode_ratio, ratio))


def blend(known: float | None, measured: float) -> float:
    """The estimate after one more measurement."""
    return measured if known is None else known + _WEIGHT * (measured - known)
