"""The gateway's two streams with the scheduler: route tables in, demand reports out.

Lost connections are made again for ever; meanwhile the last route table holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random

import grpc
import grpc.aio

from paraserve_backend.daemon.retry import Backoff
from paraserve_backend.rpc import auth
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.rpc.paraserve_pb2_grpc import SchedulerStub
from paraserve_scheduler.gateway.demand import DemandMeter
from paraserve_scheduler.gateway.routes import Routes

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 1.0
_REPORT_TIMEOUT_S = 5.0
_BACKOFF = Backoff()


class SchedulerLink:
    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        gateway: str,
        token: str | None,
        routes: Routes,
        demand: DemandMeter,
    ) -> None:
        self._stub = SchedulerStub(channel)
        self._gateway = gateway
        self._metadata = auth.metadata(token)
        self._routes = routes
        self._demand = demand

    async def run(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._watch_routes(), name="watch routes")
            tasks.create_task(self._report_demand(), name="report demand")

    async def _watch_routes(self) -> None:
        rng = random.Random()
        pauses = _BACKOFF.pauses(rng)
        while True:
            try:
                async for table in self._stub.WatchRoutes(
                    pb.WatchRoutesRequest(gateway=self._gateway), metadata=self._metadata
                ):
                    self._routes.apply(table)
                    pauses = _BACKOFF.pauses(rng)
                logger.warning("The scheduler ended the route stream; asking again.")
            except grpc.aio.AioRpcError as error:
                logger.warning("No routes from the scheduler: %s", _reason(error))
            await asyncio.sleep(next(pauses))

    async def _report_demand(self) -> None:
        while True:
            # Cleared before the report is made: whoever comes later is in the next one.
            self._demand.urgent.clear()
            await self._send_report()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(REPORT_INTERVAL_S):
                    await self._demand.urgent.wait()

    async def _send_report(self) -> None:
        try:
            await self._stub.ReportDemand(
                self._demand.report(), metadata=self._metadata, timeout=_REPORT_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            # The next report carries everything, and the route watcher warns about the loss.
            logger.debug("Demand report failed: %s", _reason(error))


def _reason(error: grpc.aio.AioRpcError) -> str:
    return f"{error.code().name}: {error.details()}"
