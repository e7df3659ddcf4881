"""Counts what this gateway's clients want; the scheduler scales by it.

It only counts: `scheduler_link` sends the reports, `routes` decides who waits.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from paraserve_backend.rpc import paraserve_pb2 as pb


@dataclass(slots=True)
class _DeploymentDemand:
    waiting: int = 0
    arrived: int = 0
    in_flight: Counter[str] = field(default_factory=Counter)
    #: By replica, seconds since the epoch.
    first_token_s: dict[str, float] = field(default_factory=dict)
    #: By replica, gaps between tokens of a stream: how many, and how long together.
    gaps: dict[str, tuple[int, float]] = field(default_factory=dict)
    #: Replicas that answer neither requests nor probes.
    silent: set[str] = field(default_factory=set)


class DemandMeter:
    """Belongs to one event loop."""

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._deployments: dict[str, _DeploymentDemand] = {}
        #: Set when a deployment's first request waits for a cold start, when a cold start has ended
        #: and when a replica falls silent: report without delay.
        self.urgent = asyncio.Event()

    def arrived(self, deployment: str) -> None:
        self._of(deployment).arrived += 1

    @contextmanager
    def waiting(self, deployment: str, *, is_cold: bool = True) -> Iterator[None]:
        """Count a request that waits; `is_cold` if no replica serves.

        Where all are full somebody waits again at every moment, which is no news.
        """
        demand = self._of(deployment)
        demand.waiting += 1
        if demand.waiting == 1 and is_cold:
            self.urgent.set()
        try:
            yield
        finally:
            demand.waiting -= 1

    @contextmanager
    def working(self, deployment: str, replica: str) -> Iterator[None]:
        in_flight = self._of(deployment).in_flight
        in_flight[replica] += 1
        try:
            yield
        finally:
            in_flight[replica] -= 1

    def pace(self, deployment: str, replica: str) -> StreamPace:
        return StreamPace(self, deployment, replica)

    def first_token(self, deployment: str, replica: str, at_s: float) -> None:
        """Note a token at `at_s` seconds since the epoch; only a replica's very first counts."""
        first_token_s = self._of(deployment).first_token_s
        if replica not in first_token_s:
            first_token_s[replica] = at_s
            self.urgent.set()

    def decoded(self, deployment: str, replica: str, gaps: int, seconds: float) -> None:
        """Note how long the gaps between a stream's tokens were together."""
        known = self._of(deployment).gaps
        count, total_s = known.get(replica, (0, 0.0))
        known[replica] = (count + gaps, total_s + seconds)

    def silent(self, deployment: str, replica: str, *, is_silent: bool) -> None:
        """Note that a replica has fallen silent, or answers again."""
        silent = self._of(deployment).silent
        if is_silent:
            silent.add(replica)
        else:
            silent.discard(replica)
        self.urgent.set()

    def num_waiting(self, deployment: str) -> int:
        demand = self._deployments.get(deployment)
        return demand.waiting if demand else 0

    def num_in_flight(self, deployment: str, replica: str) -> int:
        demand = self._deployments.get(deployment)
        return demand.in_flight[replica] if demand else 0

    def keep(self, replicas: Mapping[str, Collection[str]]) -> None:
        """Forget deployments and replicas that are not listed and have no request left."""
        for name, demand in list(self._deployments.items()):
            _forget_replicas(demand, replicas.get(name, ()))
            if name not in replicas and not demand.waiting and not demand.in_flight:
                del self._deployments[name]

    def report(self) -> pb.DemandReport:
        return pb.DemandReport(
            gateway=self._gateway,
            demands=[_message(name, demand) for name, demand in self._deployments.items()],
        )

    def _of(self, deployment: str) -> _DeploymentDemand:
        return self._deployments.setdefault(deployment, _DeploymentDemand())


class StreamPace:
    """Notes when the responses of one request came from one replica."""

    def __init__(self, meter: DemandMeter, deployment: str, replica: str) -> None:
        self._meter = meter
        self._deployment = deployment
        self._replica = replica
        self._gaps = -1
        self._first_s = self._last_s = 0.0

    def receive(self, at_s: float) -> None:
        """Note a response at `at_s` seconds since the epoch."""
        self._gaps += 1
        if self._gaps == 0:
            self._first_s = at_s
            self._meter.first_token(self._deployment, self._replica, at_s)
        self._last_s = at_s

    def end(self) -> None:
        """Note the gaps between the responses; only for an answer that ended here."""
        if self._gaps > 0:
            seconds = self._last_s - self._first_s
            self._meter.decoded(self._deployment, self._replica, self._gaps, seconds)


def _forget_replicas(demand: _DeploymentDemand, replicas: Collection[str]) -> None:
    demand.silent.intersection_update(replicas)
    for replica in (set(demand.in_flight) | set(demand.first_token_s)) - set(replicas):
        if not demand.in_flight[replica]:
            del demand.in_flight[replica]
            demand.first_token_s.pop(replica, None)
            demand.gaps.pop(replica, None)


def _message(deployment: str, demand: _DeploymentDemand) -> pb.Demand:
    replicas = sorted(set(demand.in_flight) | set(demand.first_token_s) | demand.silent)
    return pb.Demand(
        deployment=deployment,
        waiting=demand.waiting,
        in_flight=demand.in_flight.total(),
        arrived=demand.arrived,
        replicas=[
            pb.ReplicaDemand(
                replica=replica,
                in_flight=demand.in_flight[replica],
                first_token_s=demand.first_token_s.get(replica, 0.0),
                tpot_s=_mean(demand.gaps.get(replica)),
                is_silent=replica in demand.silent,
            )
            for replica in replicas
        ],
    )


def _mean(gaps: tuple[int, float] | None) -> float:
    return gaps[1] / gaps[0] if gaps else 0.0
