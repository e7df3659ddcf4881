"""Which replicas serve which deployment, which of them gets a request, and who waits for one.

It keeps the scheduler's last route table, which `scheduler_link` receives, and what this gateway
knows of replicas before the scheduler does: which died, and which say nothing (`silence`). It
refuses requests when too many wait; `upstream` sends them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Set

from paraserve_backend.errors import (
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    ParaServeError,
    Unavailable,
)
from paraserve_backend.protocol.names import deployment_of
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.errors import error_from_code
from paraserve_scheduler.gateway.config import MAX_HELD_BYTES
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.kserve.errors import NoCapacity, Overloaded, ReplicaLost
from paraserve_scheduler.gateway.kserve.metadata import MODEL_VERSION
from paraserve_scheduler.gateway.leases import Lease, Leases, Line, Waiter, Wish
from paraserve_scheduler.state.waiting import may_wait

_NAMES_IN_ERROR = 20
#: What a new deployment or replica takes from the scheduler to its gateways.
_ROUTE_CHANGE_TIMEOUT_S = 0.3
#: What a refused client is told to wait: until a place is free, and until a cold start has ended.
_FULL_RETRY_S, _COLD_RETRY_S = 1.0, 5.0
#: In this time the scheduler learns that a replica has failed, if it has.
_AVOID_S = 5.0


class Routes:
    """Belongs to one event loop."""

    def __init__(
        self,
        demand: DemandMeter,
        *,
        cold_start_timeout_s: float,
        max_held_bytes: int = MAX_HELD_BYTES,
        first_table_timeout_s: float = 5.0,
    ) -> None:
        self._demand = demand
        self._cold_start_timeout_s = cold_start_timeout_s
        self._max_held_bytes = max_held_bytes
        self._first_table_timeout_s = first_table_timeout_s
        self._table: dict[str, pb.Route] | None = None
        #: For requests that the table does not know, or not yet.
        self._changed = asyncio.Event()
        self.leases = Leases()
        #: By deployment; only those where somebody waits.
        self._lines: dict[str, Line] = {}
        self._held_bytes = 0
        #: Replicas of the table that died with a request, and those that say nothing.
        self._dead: dict[str, pb.Endpoint] = {}
        self._silent: dict[str, pb.Endpoint] = {}

    @property
    def is_known(self) -> bool:
        """Whether the scheduler has sent a table yet."""
        return self._table is not None

    @property
    def deployments(self) -> tuple[str, ...]:
        return tuple(sorted(self._table or ()))

    @property
    def ejected(self) -> tuple[pb.Endpoint, ...]:
        """Replicas of the table that get no request while there is another one."""
        return (*self._dead.values(), *self._silent.values())

    def is_silent(self, replica: str) -> bool:
        return replica in self._silent

    def apply(self, table: pb.RouteTable) -> None:
        """Take the scheduler's newest table; held requests get the replicas that it brings."""
        self._table = {route.deployment: route for route in table.routes}
        listed = {endpoint.replica for route in table.routes for endpoint in route.endpoints}
        for replica in (self._dead.keys() | self._silent.keys()) - listed:
            self._readmit(replica)
        self._demand.keep(
            {
                route.deployment: [endpoint.replica for endpoint in route.endpoints]
                for route in table.routes
            }
        )
        self._end_leases({lost for route in table.routes for lost in route.lost_replicas})
        for deployment, line in tuple(self._lines.items()):
            self._fail_waiters(deployment, line)
            self._release(deployment)
        self._changed.set()
        self._changed = asyncio.Event()

    def found_dead(self, replica: str) -> None:
        """Give nobody this replica until the scheduler has withdrawn it, or it answers again."""
        endpoint = self._listed_endpoint(replica)
        if endpoint is not None:
            self._dead[replica] = endpoint

    def found_silent(self, replica: str) -> None:
        """Give nobody this replica while there is another one; the scheduler is told at once."""
        endpoint = self._listed_endpoint(replica)
        if endpoint is not None and replica not in self._silent:
            self._silent[replica] = endpoint
            self._demand.silent(deployment_of(replica), replica, is_silent=True)

    def found_alive(self, replica: str) -> None:
        """Take a replica that has answered as any other."""
        self._readmit(replica)
        self._release(deployment_of(replica))

    def has_other(self, replica: str) -> bool:
        """Whether another replica could go on with this one's requests."""
        deployment = deployment_of(replica)
        return deployment in (self._table or ()) and bool(
            self._good(deployment, frozenset({replica}))
        )

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
        self, deployment: str, *, preferred: str | None = None, wish: Wish | None = None
    ) -> AsyncIterator[Lease]:
        """Wait for a replica with room and count a request as its.

        It is the `preferred` one if that is ready, which has made room itself, else the least busy
        one that the request does not refuse.

        Raises:
            NotFound: the deployment is unknown, or was deleted meanwhile.
            Overloaded: replicas serve, and too much waits for them already.
            NoCapacity: none serves, and too much waits for one already.
            DeadlineExceeded: no replica became ready or had room in time.
            ReplicaLost: the scheduler says that the replica failed; ends the body at once.
            ParaServeError: why the cold start that this request waited for failed, or why the
                replica was taken from it (`Lease.end`).
        """
        lease = await self._take(deployment, preferred, wish or Wish())
        self.leases.add(lease)
        try:
            async with lease.limit:
                yield lease
        except TimeoutError:
            if lease.loss is None or not lease.limit.expired():
                raise
            raise lease.loss from None
        finally:
            self.leases.remove(lease)
            self._give_back(lease)

    async def _take(self, deployment: str, preferred: str | None, wish: Wish) -> Lease:
        endpoint = None
        if preferred is not None:
            # A replica may name the next one before the scheduler has.
            await self._wait_for(
                lambda: self._named(deployment, preferred) is not None, _ROUTE_CHANGE_TIMEOUT_S
            )
            endpoint = self._named(deployment, preferred)
            if endpoint is not None and not self._is_good(endpoint):
                endpoint = None
        if endpoint is None and wish.avoided is None:
            endpoint = self._pick(deployment, wish.refused)
        if endpoint is None:
            return await self._hold(deployment, wish)
        return self._granted(deployment, endpoint, wish)

    async def _wait_for(self, condition: Callable[[], bool], limit_s: float) -> None:
        """Return when a table has made it true, or after `limit_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while not condition():
                    await self._changed.wait()

    def _end_leases(self, lost_replicas: Set[str]) -> None:
        for replica in lost_replicas:
            for lease in self.leases.of(replica):
                lease.end(ReplicaLost(f"The replica of '{lease.deployment}' was lost."))

    # ---- the table ----

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

    def _listed_endpoint(self, replica: str) -> pb.Endpoint | None:
        deployment = deployment_of(replica)
        return self._named(deployment, replica) if deployment in (self._table or ()) else None

    def _named(self, deployment: str, replica: str) -> pb.Endpoint | None:
        endpoints = self._route(deployment).endpoints
        return next((endpoint for endpoint in endpoints if endpoint.replica == replica), None)

    # ---- who gets a replica ----

    def _good(self, deployment: str, refused: frozenset[str]) -> list[pb.Endpoint]:
        return [
            endpoint
            for endpoint in self._route(deployment).endpoints
            if endpoint.replica not in refused and self._is_good(endpoint)
        ]

    def _is_good(self, endpoint: pb.Endpoint) -> bool:
        return endpoint.replica not in self._dead and endpoint.replica not in self._silent

    def _pick(self, deployment: str, refused: frozenset[str]) -> pb.Endpoint | None:
        """Return the least busy replica that has room; one that says nothing only for want of any.

        Who waits for it costs nothing: one that is silent may only have been taken for silent.
        """
        candidates = self._good(deployment, refused) or [
            endpoint
            for endpoint in self._route(deployment).endpoints
            if endpoint.replica in self._silent
            and endpoint.replica not in refused
            and endpoint.replica not in self._dead
        ]
        return min(
            (endpoint for endpoint in candidates if self._has_room(deployment, endpoint)),
            key=lambda endpoint: self._demand.num_in_flight(deployment, endpoint.replica),
            default=None,
        )

    def _has_room(self, deployment: str, endpoint: pb.Endpoint) -> bool:
        ongoing = self._demand.num_in_flight(deployment, endpoint.replica)
        return not endpoint.max_ongoing or ongoing < endpoint.max_ongoing

    def _granted(self, deployment: str, endpoint: pb.Endpoint, wish: Wish) -> Lease:
        counted = contextlib.ExitStack()
        counted.enter_context(self._demand.working(deployment, endpoint.replica))
        return Lease(
            deployment=deployment, endpoint=endpoint, may_leave=wish.may_leave, counted=counted
        )

    def _give_back(self, lease: Lease) -> None:
        lease.counted.close()
        self._release(lease.deployment)

    def _readmit(self, replica: str) -> None:
        self._dead.pop(replica, None)
        endpoint = self._silent.pop(replica, None)
        if endpoint is not None:
            self._demand.silent(deployment_of(replica), replica, is_silent=False)

    # ---- who waits ----

    async def _hold(self, deployment: str, wish: Wish) -> Lease:
        if not wish.is_resumed:
            self._require_place(deployment, wish)
        with self._waiting(deployment, wish) as waiter:
            try:
                async with asyncio.timeout(self._cold_start_timeout_s):
                    return await waiter.granted
            except BaseException as error:
                # It may have been granted in the very moment in which it was given up.
                if waiter.granted.done() and not waiter.granted.cancelled():
                    self._take_back(waiter.granted)
                if isinstance(error, TimeoutError):
                    raise self._waited_too_long(deployment) from None
                raise

    def _take_back(self, granted: asyncio.Future[Lease]) -> None:
        if granted.exception() is None:
            self._give_back(granted.result())

    def _waited_too_long(self, deployment: str) -> DeadlineExceeded:
        what = "had room" if self._serves(deployment) else "was ready"
        return DeadlineExceeded(
            f"No replica of '{deployment}' {what} within {self._cold_start_timeout_s:g} s; "
            "`paraserve status` shows why."
        )

    def _require_place(self, deployment: str, wish: Wish) -> None:
        route, line = self._route(deployment), self._lines.get(deployment)
        if not may_wait(len(line) if line else 0, route.max_waiting):
            raise self._refusal(
                deployment,
                f"{route.max_waiting} requests already wait for a replica of '{deployment}'; "
                "retry later, or deploy it with a higher --max-waiting.",
            )
        if self._held_bytes + wish.held_bytes > self._max_held_bytes:
            raise self._refusal(
                deployment,
                f"Requests of {self._held_bytes} bytes already wait in this gateway, whose setting "
                f"max_held_bytes is {self._max_held_bytes}; retry later.",
            )

    def _refusal(self, deployment: str, sentence: str) -> ParaServeError:
        if self._serves(deployment):
            return Overloaded(sentence, retry_after_s=_FULL_RETRY_S)
        return NoCapacity(sentence, retry_after_s=_COLD_RETRY_S)

    def _serves(self, deployment: str) -> bool:
        return deployment in (self._table or ()) and bool(self._good(deployment, frozenset()))

    @contextlib.contextmanager
    def _waiting(self, deployment: str, wish: Wish) -> Iterator[Waiter]:
        counted, loop = contextlib.ExitStack(), asyncio.get_running_loop()
        is_cold = not self._serves(deployment)
        counted.enter_context(self._demand.waiting(deployment, is_cold=is_cold))
        counted.enter_context(self._holding(wish.held_bytes))
        failure_number = self._route(deployment).failure_number
        waiter = Waiter(
            wish=wish,
            failure_number=failure_number,
            counted=counted,
            granted=loop.create_future(),
        )
        line = self._lines.setdefault(deployment, Line(failure_number))
        line.add(waiter)
        if wish.avoided is not None:
            timer = loop.call_later(_AVOID_S, self._stop_avoiding, deployment, waiter)
            counted.callback(timer.cancel)
            self._release(deployment)
        try:
            yield waiter
        finally:
            self._leave_line(deployment, waiter)

    @contextlib.contextmanager
    def _holding(self, size_bytes: int) -> Iterator[None]:
        self._held_bytes += size_bytes
        try:
            yield
        finally:
            self._held_bytes -= size_bytes

    def _leave_line(self, deployment: str, waiter: Waiter) -> None:
        line = self._lines.get(deployment)
        if line is None:
            return
        line.discard(waiter)
        if not line:
            del self._lines[deployment]

    def _stop_avoiding(self, deployment: str, waiter: Waiter) -> None:
        waiter.is_avoiding = False
        self._release(deployment)

    def _release(self, deployment: str) -> None:
        """Give replicas to those that wait, as many as there is room for."""
        line = self._lines.get(deployment)
        if line is None or deployment not in (self._table or ()):
            return
        granted = []
        for waiter in line:
            if waiter.granted.done():
                continue
            endpoint = self._pick(deployment, waiter.refused)
            if endpoint is not None:
                waiter.granted.set_result(self._granted(deployment, endpoint, waiter.wish))
                granted.append(waiter)
            elif not waiter.refused:
                break  # none has room, so those behind it need not ask
        for waiter in granted:
            self._leave_line(deployment, waiter)

    def _fail_waiters(self, deployment: str, line: Line) -> None:
        """End the wait for a deployment that is gone, or whose cold start has failed."""
        route = (self._table or {}).get(deployment)
        if route is not None and route.failure_number == line.failure_number:
            return
        line.failure_number = route.failure_number if route is not None else 0
        for waiter in tuple(line):
            error = self._failure(deployment, waiter)
            if error is not None:
                if not waiter.granted.done():
                    waiter.granted.set_exception(error)
                self._leave_line(deployment, waiter)

    def _failure(self, deployment: str, waiter: Waiter) -> ParaServeError | None:
        try:
            route = self._route(deployment)
        except ParaServeError as error:
            return error
        if route.endpoints or route.failure_number <= waiter.failure_number:
            return None
        return error_from_code(
            route.failure.grpc_code,
            f"The cold start of '{deployment}' failed: {route.failure.message}",
        )
