"""Finds replicas that say nothing, and takes their requests from them once they can go elsewhere.

A replica with a request that has had no response for a second is probed: its generate loop answers
at once, however long a pass or the queue is. One that does not answer, or says that its passes do
not return, is silent: `routes` gives it no request while there is another one, and the scheduler is
told. It is probed on, and is as any other once it answers. `upstream` sends the probes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_scheduler.gateway.kserve.errors import ReplicaSilent
from paraserve_scheduler.gateway.routes import Routes

#: How often replicas are looked at.
_TICK_S = 0.05
#: A request without a response for so long has its replica probed, and so again after an answer.
_SILENCE_S = 1.0
#: A probe without an answer for so long has failed. Two of them make a replica silent: a second and
#: twice this are less than 3 s.
_PROBE_S = 0.85
_FAILED_PROBES = 2

#: Returns whether the replica works, when it answers.
Probe = Callable[[pb.Endpoint], Awaitable[bool]]


@dataclass(slots=True, kw_only=True)
class _Watched:
    """A replica that is probed."""

    endpoint: pb.Endpoint
    #: When it was last asked, or answered, by the clock of the leases.
    asked_s: float
    answered_s: float
    #: The newest probes, oldest first, and how many in a row have had no answer in time.
    probes: list[asyncio.Future[bool]] = field(default_factory=list)
    failed: int = 0
    #: It said itself that it does not work.
    is_stuck: bool = False


class SilenceWatch:
    """Belongs to one event loop."""

    def __init__(self, routes: Routes, probe: Probe) -> None:
        self._routes = routes
        self._leases = routes.leases
        self._probe = probe
        self._watched: dict[str, _Watched] = {}

    async def run(self) -> None:
        """Watch until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            last_s = loop.time()
            while True:
                await asyncio.sleep(_TICK_S)
                now_s = loop.time()
                self.tick(now_s - last_s)
                last_s = now_s
        finally:
            for replica in tuple(self._watched):
                self._leave(replica)

    def tick(self, elapsed_s: float) -> None:
        """Look at all replicas with requests, and at those that are out of use.

        What has come while the gateway stood still is read only after this: of a longer time than
        a tick no more than a tick counts.
        """
        self._leases.now_s += min(elapsed_s, _TICK_S)
        ejected = {endpoint.replica: endpoint for endpoint in self._routes.ejected}
        for replica in self._watched.keys() - ejected.keys() - set(self._leases.replicas):
            self._leave(replica)
        for replica in self._leases.replicas:
            self._look(replica, next(self._leases.of(replica)).endpoint, replica in ejected)
        for replica, endpoint in ejected.items():
            if replica not in self._leases.replicas:
                self._look(replica, endpoint, is_ejected=True)

    def _look(self, replica: str, endpoint: pb.Endpoint, is_ejected: bool) -> None:
        is_silent = self._leases.silent_s(replica) >= _SILENCE_S
        watched = self._watched.get(replica)
        if watched is None:
            if is_ejected or is_silent:
                self._begin(endpoint, asks_now=is_silent)
        elif is_ejected or is_silent:
            self._judge(replica, watched)
        else:
            self._leave(replica)
        if self._routes.is_silent(replica) and self._routes.has_other(replica):
            self._take_requests_from(replica)

    def _begin(self, endpoint: pb.Endpoint, *, asks_now: bool) -> None:
        now_s = self._leases.now_s
        watched = _Watched(endpoint=endpoint, asked_s=now_s, answered_s=now_s)
        self._watched[endpoint.replica] = watched
        # Of one that has just died with a request there is no other news yet.
        if asks_now:
            self._ask(watched)

    def _judge(self, replica: str, watched: _Watched) -> None:
        now_s = self._leases.now_s
        if self._is_only_slow(replica, watched):
            self._alive(replica, watched)
        elif not watched.probes:
            if now_s - watched.answered_s >= _SILENCE_S:
                self._ask(watched)
        elif now_s - watched.asked_s >= _PROBE_S:
            watched.failed += 1
            if watched.failed >= _FAILED_PROBES:
                self._routes.found_silent(replica)
            self._ask(watched)

    def _is_only_slow(self, replica: str, watched: _Watched) -> bool:
        """Whether others of its requests have had responses while its probe had none."""
        has_answered = self._leases.has_answered_since(replica, watched.asked_s)
        return has_answered and watched.failed > 0 and not watched.is_stuck

    def _ask(self, watched: _Watched) -> None:
        # A late answer to an older probe is as good. But one that was lost never comes.
        if len(watched.probes) >= _FAILED_PROBES:
            watched.probes.pop(0).cancel()
        watched.asked_s = self._leases.now_s
        probe = asyncio.ensure_future(self._probe(watched.endpoint))
        watched.probes.append(probe)
        probe.add_done_callback(lambda done: self._answered(watched, done))

    def _answered(self, watched: _Watched, probe: asyncio.Future[bool]) -> None:
        if probe.cancelled() or probe not in watched.probes:
            return
        replica = watched.endpoint.replica
        if probe.result():
            self._alive(replica, watched)
            return
        watched.probes.remove(probe)
        watched.answered_s = self._leases.now_s
        watched.is_stuck = True
        self._routes.found_silent(replica)

    def _alive(self, replica: str, watched: _Watched) -> None:
        watched.failed, watched.is_stuck = 0, False
        watched.answered_s = self._leases.now_s
        for probe in watched.probes:
            probe.cancel()
        watched.probes.clear()
        self._routes.found_alive(replica)

    def _take_requests_from(self, replica: str) -> None:
        for lease in self._leases.of(replica):
            if self._leases.now_s - lease.heard_s < _SILENCE_S:
                break  # so have all that follow
            if lease.may_leave() and not lease.is_delivering:
                lease.end(
                    ReplicaSilent(
                        f"The replica of '{lease.deployment}' did not answer for a while and was "
                        "left; retry."
                    )
                )

    def _leave(self, replica: str) -> None:
        for probe in self._watched.pop(replica).probes:
            probe.cancel()
