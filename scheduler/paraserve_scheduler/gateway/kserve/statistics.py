"""Triton's statistics extension: what this gateway has counted since it started, by deployment.

One JSON form, from which the gRPC message is made. docs/protocol.md says what each figure covers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from google.protobuf import json_format
from tritonclient.grpc import service_pb2 as kserve

from paraserve_scheduler.gateway.kserve.metadata import MODEL_VERSION, Json

Clock = Callable[[], int]


@dataclass(slots=True)
class _Duration:
    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        self.count += 1
        self.ns += ns

    def json(self) -> Json:
        return {"count": self.count, "ns": self.ns}


@dataclass(slots=True)
class _Counts:
    last_inference_ms: int = 0
    success: _Duration = field(default_factory=_Duration)
    fail: _Duration = field(default_factory=_Duration)
    queue: _Duration = field(default_factory=_Duration)
    at_replica: _Duration = field(default_factory=_Duration)


class RequestTimes:
    """When one request came in and when its replica got it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.start_ns = self.given_ns = clock()

    def given_to_replica(self) -> None:
        """Note the end of the wait; called for every replica tried, and the last one counts."""
        self.given_ns = self._clock()


class Statistics:
    """Belongs to one event loop."""

    def __init__(self, clock: Clock = time.monotonic_ns, epoch: Clock = time.time_ns) -> None:
        """Begin at zero; `clock` gives nanoseconds, `epoch` those since the epoch."""
        self._clock = clock
        self._epoch = epoch
        self._deployments: dict[str, _Counts] = {}

    @contextmanager
    def request(self, deployment: str) -> Iterator[RequestTimes]:
        """Count the body as one request, failed if it raises or is cancelled."""
        counts = self._deployments.setdefault(deployment, _Counts())
        counts.last_inference_ms = self._epoch() // 1_000_000
        times = RequestTimes(self._clock)
        try:
            yield times
        except BaseException:
            counts.fail.add(self._clock() - times.start_ns)
            raise
        end_ns = self._clock()
        counts.success.add(end_ns - times.start_ns)
        counts.queue.add(times.given_ns - times.start_ns)
        counts.at_replica.add(end_ns - times.given_ns)

    def report(self, deployments: Iterable[str]) -> Json:
        """Return the body of a statistics response; zeros for a deployment without requests."""
        return {
            "model_stats": [
                _report(name, self._deployments.get(name, _Counts())) for name in deployments
            ]
        }

    def message(self, deployments: Iterable[str]) -> kserve.ModelStatisticsResponse:
        return json_format.ParseDict(self.report(deployments), kserve.ModelStatisticsResponse())


def _report(deployment: str, counts: _Counts) -> Json:
    nothing = _Duration().json()
    return {
        "name": deployment,
        "version": MODEL_VERSION,
        "last_inference": counts.last_inference_ms,
        "inference_count": counts.success.count,
        "execution_count": counts.success.count,
        "inference_stats": {
            "success": counts.success.json(),
            "fail": counts.fail.json(),
            "queue": counts.queue.json(),
            "compute_input": nothing,
            "compute_infer": counts.at_replica.json(),
            "compute_output": nothing,
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": [],
        "memory_usage": [],
        "response_stats": {},
    }
