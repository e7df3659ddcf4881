"""What was learned from reports: a deployment's arrivals and durations, a node kind's starts.

A new measurement counts a third. The times of a start are read from its spans. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from paraserve_backend.telemetry.spans import Span, SpanName

#: Arrivals that are remembered.
_KEPT = 32
#: Completed requests after which older ones count half.
_HALF_LIFE = 64.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandHistory:
    #: Times of the last arrivals, oldest first; as exact as the reports are frequent.
    arrivals_s: tuple[float, ...] = ()
    #: Seconds that requests have been running, summed over requests, and how many have ended.
    busy_s: float = 0.0
    completed: float = 0.0

    @property
    def service_s(self) -> float | None:
        """Mean time a request runs, by Little's law; None before the first has ended."""
        return self.busy_s / self.completed if self.completed >= 1 else None

    def after(
        self, *, arrived: int, completed: int, running: int, elapsed_s: float, at_s: float
    ) -> DemandHistory:
        """The history with one more report of a gateway.

        Args:
            arrived: requests that came since its last one.
            completed: requests that ended since.
            running: requests that ran meanwhile.
            elapsed_s: since its last one.
            at_s: of this one.
        """
        keep = 0.5 if self.completed + completed > _HALF_LIFE else 1.0
        return DemandHistory(
            arrivals_s=(*self.arrivals_s, *(at_s,) * min(arrived, _KEPT))[-_KEPT:],
            busy_s=keep * (self.busy_s + running * elapsed_s),
            completed=keep * (self.completed + completed),
        )


#: What a new measurement counts beside all before it.
_WEIGHT = 1 / 3
#: Fetches below this say more about latency than about bandwidth.
_LEAST_BYTES = 50_000_000


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
    names = {span.name for span in ended}
    begin_s = min((span.start_s for span in ended), default=0.0)
    takes_in = [it.start_s - begin_s for it in ended if it.name is SpanName.ADOPT_WEIGHTS]
    fetches = [it.end_s - begin_s for it in ended if it.name is SpanName.FETCH]
    return StageTimes(
        runtime_s=max(takes_in, default=None),
        fetch_s=max(fetches, default=None),
        ready_s=max((span.end_s - begin_s for span in ended), default=None),
        used_slot=SpanName.BIND in names,
        fetched_bytes=fetched_bytes,
        is_from_store=SpanName.FETCH_FROM not in names,
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
