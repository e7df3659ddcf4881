"""Which replicas serve which deployment, which of them gets a request, and who waits for one.

It keeps the scheduler's last route table, which `scheduler_link` receives. It refuses requests when
too many wait; `upstream` sends them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Set

from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ResourceExhausted,
    Unavailable,
)
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.errors import error_from_code
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import ReplicaLost
from paraserve_scheduler.gateway.kserve.metadata import MODEL_VERSION
from paraserve_scheduler.state.waiting import may_wait

_NAMES_IN_ERROR = 20
#: What a new deployment or replica takes from the scheduler to its gateways.
_ROUTE_CHANGE_TIMEOUT_S = 0.3


class Routes:
    """Belongs to one event loop."""

    def __init__(
        self,
        demand: DemandMeter,
        *,
        cold_start_timeout_s: float,
        first_table_timeout_s: float = 5.0,
    ) -> None:
        self._demand = demand
        self._cold_start_timeout_s = cold_start_timeout_s
        self._first_table_timeout_s = first_table_timeout_s
        self._table: dict[str, pb.Route] | None = None
        self._changed = asyncio.Event()
        #: By replica, what ends the wait of each request it has.
        self._leases: defaultdict[str, set[asyncio.Timeout]] = defaultdict(set)

    @property
    def is_known(self) -> bool:
        """Whether the scheduler has sent a table yet."""
        return self._table is not None

    @property
    def deployments(self) -> tuple[str, ...]:
        return tuple(sorted(self._table or ()))

    def apply(self, table: pb.RouteTable) -> None:
        """Take the scheduler's newest table; held requests look at it in the next loop turn."""
        self._table = {route.deployment: route for route in table.routes}
        self._demand.keep(
            {
                route.deployment: [endpoint.replica for endpoint in route.endpoints]
                for route in table.routes
            }
        )
        self._end_leases({lost for route in table.routes for lost in route.lost_replicas})
        self._changed.set()
        self._changed = asyncio.Event()

    async def _wait_for(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Return when a table has made it true, or after `limit_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not condition():
                    await self._changed.wait()

    def _end_leases(self, lost_replicas: Set[str]) -> None:
        now_s = asyncio.get_running_loop().time()
        for replica in lost_replicas & self._leases.keys():
            for lease in self._leases.pop(replica):
                lease.reschedule(now_s)

    async def require(self, deployment: str, version: str = "") -> pb.Route:
        """Return the route of a deployment.

        Waits a moment for the very first table, and for one with a deployment that is unknown: it
        may have been deployed just now.

        Raises:
            NotFound: the scheduler has no such deployment, or it has no such version.
            Unavailable: the scheduler has not been reached yet.
        """
        await self._wait_for(lambda: self.is_known, self._first_table_timeout_s)
        await self._wait_for(lambda: deployment in (self._table or ()), _ROUTE_CHANGE_TIMEOUT_S)
        route = self._route(deployment)
        if version not in ("", MODEL_VERSION):
            raise NotFound(
                f"Request for unknown model: '{deployment}' version {version} is not found. "
                f"Every deployment has version {MODEL_VERSION} only."
            )
        return route

    @contextlib.asynccontextmanager
    async def lease(
        self,
        deployment: str,
        *,
        preferred: str | None = None,
        refused: frozenset[str] = frozenset(),
    ) -> AsyncIterator[pb.Endpoint]:
        """Wait for a ready replica and count a request as its.

        It is the `preferred` one if that is ready, else the least busy one not in `refused`.

        Raises:
            NotFound: the deployment is unknown, or was deleted meanwhile.
            ResourceExhausted: too many requests wait already.
            DeadlineExceeded: no replica became ready in time.
            ReplicaLost: the scheduler says that the replica failed; ends the body at once.
            ParaServeError: why the cold start that this request waited for failed.
        """
        endpoint = None
        if preferred is not None:
            # A replica may name the next one before the scheduler has.
            await self._wait_for(
                lambda: self._named(deployment, preferred) is not None, _ROUTE_CHANGE_TIMEOUT_S
            )
            endpoint = self._named(deployment, preferred)
        if endpoint is None:
            endpoint = self._pick(deployment, refused)
        if endpoint is None:
            endpoint = await self._hold(deployment, refused)
        lease, leases = asyncio.timeout(None), self._leases[endpoint.replica]
        leases.add(lease)
        try:
            with self._demand.working(deployment, endpoint.replica):
                async with lease:
                    yield endpoint
        except TimeoutError:
            if not lease.expired():
                raise
            raise ReplicaLost(f"The replica of '{deployment}' was lost; retry.") from None
        finally:
            leases.discard(lease)
            if not leases:
                self._leases.pop(endpoint.replica, None)

    def _route(self, deployment: str) -> pb.Route:
        if self._table is None:
            raise Unavailable("This gateway has not reached its scheduler yet; retry shortly.")
        if not deployment:
            raise InvalidRequest("The request names no model.")
        route = self._table.get(deployment)
        if route is None:
            raise NotFound(
                f"Request for unknown model: '{deployment}' is not found. "
                f"Deployments: {self._listed()}."
            )
        return route

    def _listed(self) -> str:
        names = self.deployments
        more = len(names) - _NAMES_IN_ERROR
        listed = ", ".join(names[:_NAMES_IN_ERROR]) or "none"
        return f"{listed} and {more} more" if more > 0 else listed

    def _named(self, deployment: str, replica: str) -> pb.Endpoint | None:
        endpoints = self._route(deployment).endpoints
        return next((endpoint for endpoint in endpoints if endpoint.replica == replica), None)

    def _pick(self, deployment: str, refused: frozenset[str]) -> pb.Endpoint | None:
        endpoints = [e for e in self._route(deployment).endpoints if e.replica not in refused]
        return min(
            endpoints,
            key=lambda endpoint: self._demand.num_in_flight(deployment, endpoint.replica),
            default=None,
        )

    async def _hold(self, deployment: str, refused: frozenset[str]) -> pb.Endpoint:
        route = self._route(deployment)
        last_failure_number = route.failure_number
        if not may_wait(self._demand.num_waiting(deployment), route.max_waiting):
            raise ResourceExhausted(
                f"{route.max_waiting} requests already wait for a replica of '{deployment}'; "
                "retry later, or deploy it with a higher --max-waiting."
            )
        with self._demand.waiting(deployment):
            try:
                async with asyncio.timeout(self._cold_start_timeout_s):
                    return await self._next_endpoint(deployment, refused, last_failure_number)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"No replica of '{deployment}' was ready within "
                    f"{self._cold_start_timeout_s:g} s; `paraserve status` shows why."
                ) from None

    async def _next_endpoint(
        self, deployment: str, refused: frozenset[str], last_failure_number: int
    ) -> pb.Endpoint:
        while True:
            await self._changed.wait()
            endpoint = self._pick(deployment, refused)
            if endpoint is not None:
                return endpoint
            route = self._route(deployment)
            if route.failure_number > last_failure_number:
                raise error_from_code(
                    route.failure.grpc_code,
                    f"The cold start of '{deployment}' failed: {route.failure.message}",
                )
