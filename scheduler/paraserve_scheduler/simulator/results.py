"""The result of a run and its summary: attainment, percentiles, cost, bytes moved. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from paraserve_scheduler.simulator.description import DeploymentDescription
from paraserve_scheduler.simulator.trace import Trace
from paraserve_scheduler.simulator.workload import SimRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class ColdStart:
    """One start as it was predicted and as it went."""

    replica: str
    stages: int
    predicted_s: float | None
    actual_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RunProgress:
    """How far a run is. Requests are done that have ended or were refused."""

    num_done: int
    num_requests: int


@dataclass(slots=True, kw_only=True)
class Outcome:
    requests: Sequence[SimRequest]
    cold_starts: list[ColdStart] = field(default_factory=list)
    gpu_byte_s: float = 0.0
    #: Over the network, into nodes.
    moved_bytes: float = 0.0
    #: Replicas that ended with a node.
    lost_replicas: int = 0
    decisions: int = 0
    ended_s: float = 0.0
    trace: Trace = field(default_factory=Trace)


_GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Of the requests of one application, or of all. Unfinished ones have missed."""

    requests: int
    #: Those that were not let in, and those let in that never ended.
    refused: int
    unfinished: int
    #: Parts of 1.
    ttft_met: float
    tpot_met: float
    cold: float
    ttft_p50_s: float
    ttft_p90_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    all: Attainment
    applications: Mapping[str, Attainment]
    gpu_gb_s_per_request: float
    moved_gb: float
    cold_starts: int
    #: Replicas that ended with a node.
    lost_replicas: int
    #: Mean number of stages of a cold start.
    stages: float
    #: Median of |predicted - actual| / actual; None where the policy predicts nothing.
    prediction_error: float | None
    duration_s: float


def summarize(outcome: Outcome, deployments: Sequence[DeploymentDescription]) -> Summary:
    described = {deployment.name: deployment for deployment in deployments}
    groups: dict[str, list[SimRequest]] = {}
    for request in outcome.requests:
        groups.setdefault(described[request.deployment].application, []).append(request)
    starts = outcome.cold_starts
    errors = [
        abs(start.predicted_s - start.actual_s) / start.actual_s
        for start in starts
        if start.predicted_s is not None and start.actual_s > 0
    ]
    return Summary(
        all=_attainment(outcome.requests, described),
        applications={name: _attainment(groups[name], described) for name in sorted(groups)},
        gpu_gb_s_per_request=outcome.gpu_byte_s / _GB / max(1, len(outcome.requests)),
        moved_gb=outcome.moved_bytes / _GB,
        cold_starts=len(starts),
        lost_replicas=outcome.lost_replicas,
        stages=sum(start.stages for start in starts) / max(1, len(starts)),
        prediction_error=percentile(errors, 0.5) if errors else None,
        duration_s=outcome.ended_s,
    )


def _attainment(
    requests: Sequence[SimRequest], described: Mapping[str, DeploymentDescription]
) -> Attainment:
    count = max(1, len(requests))
    ttfts = [request.ttft_s for request in requests if request.ttft_s is not None]
    tpots = [request.tpot_s for request in requests if request.tpot_s is not None]
    return Attainment(
        requests=len(requests),
        refused=sum(request.was_refused for request in requests),
        unfinished=sum(request.end_s is None and not request.was_refused for request in requests),
        ttft_met=sum(_meets_ttft(request, described[request.deployment]) for request in requests)
        / count,
        tpot_met=sum(_meets_tpot(request, described[request.deployment]) for request in requests)
        / count,
        cold=sum(request.was_cold for request in requests) / count,
        ttft_p50_s=percentile(ttfts, 0.5),
        ttft_p90_s=percentile(ttfts, 0.9),
        ttft_p99_s=percentile(ttfts, 0.99),
        tpot_p50_s=percentile(tpots, 0.5),
        tpot_p99_s=percentile(tpots, 0.99),
    )


def _meets_ttft(request: SimRequest, described: DeploymentDescription) -> bool:
    limit_s = described.objectives.ttft_s
    return request.ttft_s is not None and (limit_s is None or request.ttft_s <= limit_s)


def _meets_tpot(request: SimRequest, described: DeploymentDescription) -> bool:
    limit_s = described.objectives.tpot_s
    if request.end_s is None:
        return False
    return limit_s is None or request.tpot_s is None or request.tpot_s <= limit_s


def percentile(values: Iterable[float], part: float) -> float:
    """The value that `part` of them do not exceed; 0 of none."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    return ordered[min(len(ordered) - 1, int(part * len(ordered)))]


def as_json(summary: Summary) -> dict[str, Any]:
    return asdict(summary)
