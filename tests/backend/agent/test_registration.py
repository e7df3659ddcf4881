from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from paraserve_backend.agent.registration import Registration
from paraserve_backend.rpc import paraserve_pb2 as pb


def away() -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, empty, empty, "connection refused", None
    )


class FakeScheduler:
    """Knows the agents that registered; can be away, and can forget."""

    def __init__(self, *, heartbeat_interval_s: float = 3600) -> None:
        self.is_away = False
        self.known = False
        self.events: list[str] = []
        self._interval_s = heartbeat_interval_s
        self._waiters: list[tuple[Callable[[], bool], asyncio.Event]] = []

    async def register(self, info: pb.NodeInfo) -> pb.RegisterReply:
        self._note("register")
        if self.is_away:
            raise away()
        self.known = True
        return pb.RegisterReply(heartbeat_interval_s=self._interval_s)

    async def heartbeat(self, status: pb.NodeStatus) -> pb.HeartbeatReply:
        self._note(f"heartbeat {len(status.parts)}")
        if self.is_away:
            raise away()
        return pb.HeartbeatReply(known=self.known)

    async def until(self, condition: Callable[[list[str]], bool]) -> None:
        event = asyncio.Event()
        self._waiters.append((lambda: condition(self.events), event))
        self._wake()
        await event.wait()

    def _note(self, event: str) -> None:
        self.events.append(event)
        self._wake()

    def _wake(self) -> None:
        for holds, event in self._waiters:
            if holds():
                event.set()


class Bench:
    """A registration at work, whose pauses take no time but are noted."""

    def __init__(self, scheduler: FakeScheduler) -> None:
        self.scheduler = scheduler
        self.changed = asyncio.Event()
        self.status = pb.NodeStatus(name="node-1")
        self.pauses_s: list[float] = []
        self.registration = Registration(
            scheduler, pb.NodeInfo(name="node-1"), self._status, self.changed, self._pause
        )

    async def _status(self) -> pb.NodeStatus:
        return self.status

    async def _pause(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        await asyncio.sleep(0)


@asynccontextmanager
async def registering(scheduler: FakeScheduler) -> AsyncIterator[Bench]:
    bench = Bench(scheduler)
    running = asyncio.create_task(bench.registration.run())
    yield bench
    running.cancel()
    await asyncio.wait([running])


async def test_a_change_is_reported_before_the_interval_is_over() -> None:
    async with registering(FakeScheduler(heartbeat_interval_s=3600)) as bench:
        await bench.scheduler.until(lambda events: events == ["register", "heartbeat 0"])
        bench.status.parts.add(replica="tiny.1")
        bench.changed.set()
        await bench.scheduler.until(lambda events: events[2:] == ["heartbeat 1"])


async def test_without_changes_a_heartbeat_goes_out_every_interval() -> None:
    async with registering(FakeScheduler(heartbeat_interval_s=0.01)) as bench:
        await bench.scheduler.until(lambda events: events == ["register", *["heartbeat 0"] * 3])


async def test_a_forgotten_agent_registers_again() -> None:
    async with registering(FakeScheduler()) as bench:
        await bench.scheduler.until(lambda events: len(events) == 2)
        bench.scheduler.known = False
        bench.changed.set()
        await bench.scheduler.until(
            lambda events: events[2:] == ["heartbeat 0", "register", "heartbeat 0"]
        )


async def test_an_absent_scheduler_is_tried_ever_less_often_and_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    scheduler = FakeScheduler()
    scheduler.is_away = True
    with caplog.at_level(logging.INFO):
        async with registering(scheduler) as bench:
            await bench.scheduler.until(lambda events: len(events) >= 9)
            bench.scheduler.is_away = False
            await bench.scheduler.until(lambda events: events[-1] == "heartbeat 0")
    full_s = [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    assert all(
        most / 2 <= pause_s <= most
        for pause_s, most in zip(bench.pauses_s[:8], full_s, strict=True)
    )
    assert [record.message for record in caplog.records] == [
        "scheduler away code=UNAVAILABLE reason=connection refused",
        "registered",
    ]


async def test_a_scheduler_that_goes_away_is_registered_with_when_it_is_back() -> None:
    async with registering(FakeScheduler()) as bench:
        await bench.scheduler.until(lambda events: len(events) == 2)
        bench.scheduler.is_away = True
        bench.changed.set()
        await bench.scheduler.until(lambda events: events[-2:] == ["register", "register"])
        bench.scheduler.is_away = False
        await bench.scheduler.until(lambda events: events[-1] == "heartbeat 0")
