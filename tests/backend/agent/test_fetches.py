from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paraserve_backend.agent.disk_upkeep import DiskUpkeep
from paraserve_backend.agent.fetches import Fetches, FetchLimits, FetchRequest
from paraserve_backend.byte_ranges import merge
from paraserve_backend.errors import AlreadyExists, InvalidRequest, NotFound
from paraserve_backend.rpc import paraserve_pb2 as pb
from paraserve_backend.telemetry.spans import Span, SpanFile, SpanName
from paraserve_backend.weights.checkpoint.fetch_plan import FetchPlan
from paraserve_backend.weights.sources.base import Connection, Source, StoredObject
from paraserve_backend.weights.sources.open import Sources, open_source
from paraserve_backend.weights.tiers.disk import DiskTier
from paraserve_backend.weights.tiers.layout import FetchStatus
from paraserve_backend.weights.tiers.memory import Tier
from paraserve_backend.weights.tiers.reader import TierReader
from tests.support.agents import make_plan, make_request
from tests.support.checkpoints import make_plan as plan_of
from tests.support.checkpoints import write_checkpoint
from tests.support.limits import HANG_S
from tests.support.patience import patient_fetches


def make_fetches(folder: Path, threads: int = 1) -> Fetches:
    return Fetches(Tier.open(folder / "tier"), FetchLimits(threads=threads))


@pytest.fixture
async def fetches(tmp_path: Path) -> AsyncIterator[Fetches]:
    fetches = make_fetches(tmp_path)
    yield fetches
    await fetches.close()


async def run_to_end(fetches: Fetches, request_plan: Path) -> int:
    return await (await fetches.start(make_request(make_plan(request_plan)), HANG_S)).wait()


async def test_a_started_fetch_can_be_found_by_readers_at_once(
    fetches: Fetches, tmp_path: Path
) -> None:
    fetching = await fetches.start(make_request(make_plan(tmp_path / "m")), HANG_S)
    TierReader.open(tmp_path / "tier", "tiny.1.0")
    await fetching.wait()


async def test_who_listens_late_hears_the_newest_progress(fetches: Fetches, tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "m")
    told: list[tuple[int, int]] = []
    fetching = await fetches.start(make_request(plan), HANG_S)
    await fetching.wait()
    fetching.listen(lambda landed, total: told.append((landed, total)))
    assert told == [(plan.total_bytes, plan.total_bytes)]


async def test_what_has_landed_is_not_fetched_again_until_it_is_released(
    fetches: Fetches, tmp_path: Path
) -> None:
    total_bytes = make_plan(tmp_path / "m").total_bytes
    assert await run_to_end(fetches, tmp_path / "m") == total_bytes
    assert await fetches.release("tiny.1.0") is True
    assert await fetches.release("tiny.1.0") is False
    assert await fetches.contents() == ([], 0)


async def test_a_second_start_of_the_same_fetch_joins_and_of_another_plan_is_refused(
    fetches: Fetches, tmp_path: Path
) -> None:
    request = make_request(make_plan(tmp_path / "m"))
    other = replace(request, plan=replace(request.plan, files=()))
    first = await fetches.start(request, HANG_S)
    second = await fetches.start(request, HANG_S)
    assert await first.wait() == await second.wait()
    with pytest.raises(AlreadyExists):
        await (await fetches.start(other, HANG_S)).wait()


class _MeetingSource:
    """A source whose connections wait in their first read until there are so many of them."""

    def __init__(self, inner: Source, num_connections: int) -> None:
        self._inner = inner
        self.store = inner.store
        self._barrier = threading.Barrier(num_connections, timeout=HANG_S)
        self.connections: list[Connection] = []

    @property
    def uri(self) -> str:
        return self._inner.uri

    def list(self) -> tuple[StoredObject, ...]:
        return self._inner.list()

    def connect(self) -> Connection:
        connection = self._inner.connect()
        self.connections.append(connection)
        self._barrier.wait()
        return connection


@pytest.mark.parametrize(("background", "num_connections"), [(False, 3), (True, 1)])
async def test_a_fetch_that_nobody_waits_for_takes_one_connection(
    background: bool, num_connections: int, tmp_path: Path
) -> None:
    plan = plan_of(write_checkpoint(tmp_path / "m", shards=2), fetch_id="m.1.0")
    source = _MeetingSource(open_source(plan.source_uri), num_connections)

    class Meeting(FetchRequest):
        def open(self, sources: Sources) -> Source:
            return source

    fetches = make_fetches(tmp_path, threads=3)
    request = Meeting(plan=plan, endpoint_url=None, region=None, background=background)
    await (await fetches.start(request, HANG_S)).wait()
    await fetches.close()
    assert len(source.connections) == num_connections


def test_a_request_says_whether_anybody_waits_for_it(tmp_path: Path) -> None:
    plan_json = make_plan(tmp_path / "m").to_json()
    for background in (False, True):
        message = pb.Fetch(plan_json=plan_json, background=background)
        assert FetchRequest.from_message(message).background is background


async def test_a_fetch_whose_source_cannot_even_be_opened_does_not_start(
    fetches: Fetches, tmp_path: Path
) -> None:
    plan = replace(make_plan(tmp_path / "m"), source_uri="ftp://nowhere")
    with pytest.raises(InvalidRequest, match="ftp://nowhere"):
        await fetches.start(make_request(plan), HANG_S)
    with pytest.raises(NotFound):
        TierReader.open(tmp_path / "tier", "tiny.1.0")


async def test_a_failed_fetch_can_be_started_again(fetches: Fetches, tmp_path: Path) -> None:
    request = make_request(make_plan(tmp_path / "m"))
    (tmp_path / "m").rename(tmp_path / "away")
    with pytest.raises(NotFound):
        await (await fetches.start(request, HANG_S)).wait()
    (tmp_path / "away").rename(tmp_path / "m")
    assert await (await fetches.start(request, HANG_S)).wait() == request.plan.total_bytes


async def test_a_fetch_that_failed_before_anybody_could_look_can_be_started_again(
    fetches: Fetches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told = asyncio.get_running_loop(), threading.Semaphore(0)
    tell = loop.call_soon_threadsafe

    def count(*arguments: Any, **options: Any) -> asyncio.Handle:
        handle = tell(*arguments, **options)
        told.release()
        return handle

    def stand_still() -> None:
        """Go on once the thread has said both that it has begun and that it has failed."""
        assert told.acquire(timeout=HANG_S)
        assert told.acquire(timeout=HANG_S)

    monkeypatch.setattr(loop, "call_soon_threadsafe", count)
    request = make_request(make_plan(tmp_path / "m"))
    (tmp_path / "m").rename(tmp_path / "away")
    loop.call_soon(loop.call_soon, stand_still)  # when the fetch is on its way
    with pytest.raises(NotFound):
        await (await fetches.start(request, HANG_S)).wait()
    (tmp_path / "away").rename(tmp_path / "m")
    assert await (await fetches.start(request, HANG_S)).wait() == request.plan.total_bytes


async def test_stopping_is_no_error_whatever_the_state(fetches: Fetches, tmp_path: Path) -> None:
    await fetches.stop("unknown")
    fetching = await fetches.start(make_request(make_plan(tmp_path / "m")), HANG_S)
    await fetches.stop("tiny.1.0")
    await fetching.stop()
    assert await fetches.release("tiny.1.0") is True


async def test_spans_of_readers_are_read_and_none_are_needed(
    fetches: Fetches, tmp_path: Path
) -> None:
    await run_to_end(fetches, tmp_path / "m")
    assert await fetches.spans("tiny.1.0") == ()
    span = Span(name=SpanName.ADOPT_WEIGHTS, start_s=1.0, end_s=2.0, size_bytes=3)
    SpanFile(tmp_path / "tier" / "fetches" / "tiny.1.0" / "spans.jsonl").append(span)
    assert await fetches.spans("tiny.1.0") == (span,)


async def test_a_new_agent_finds_what_an_old_one_left_and_can_release_it(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "m")
    old = Tier.open(tmp_path / "tier")
    assert old.begin(plan).status is FetchStatus.RUNNING
    old.close()
    fetches = make_fetches(tmp_path)
    await fetches.release_all()
    assert await fetches.contents() == ([], 0)
    await fetches.close()


def make_caching(folder: Path, *, memory_bytes: int, tier_bytes: int) -> Fetches:
    tier = Tier.open(folder / "tier", cache_bytes=tier_bytes)
    limits = FetchLimits(threads=2, tier_bytes=tier_bytes, memory_bytes=memory_bytes)
    return Fetches(tier, limits)


async def use(fetches: Fetches, plan: FetchPlan, reserved_bytes: int = 0) -> int:
    """Fetch, as for a replica that may use so much, and release; returns what was fetched."""
    request = replace(make_request(plan), reserved_bytes=reserved_bytes)
    fetched_bytes = await (await fetches.start(request, HANG_S)).wait()
    await fetches.release(plan.fetch_id)
    return fetched_bytes


async def test_what_stays_in_the_tier_is_told_in_the_timeline_of_the_next_fetch(
    tmp_path: Path,
) -> None:
    plan = make_plan(tmp_path / "m")
    fetches = make_caching(tmp_path, memory_bytes=1 << 30, tier_bytes=1 << 30)
    assert await use(fetches, plan) == plan.total_bytes
    again = replace(plan, fetch_id="tiny.2.0")
    assert await (await fetches.start(make_request(again), HANG_S)).wait() == 0
    (span,) = await fetches.spans("tiny.2.0")
    assert (span.label, span.size_bytes) == ("fetch from tier", plan.total_bytes)
    await fetches.close()


@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (0, 4)])
async def test_reports_say_which_bytes_of_an_object_are_there_as_few_ranges(
    fetches: Fetches, tmp_path: Path, layers: tuple[int, int]
) -> None:
    plan = plan_of(write_checkpoint(tmp_path / "m"), fetch_id="m.1.0", layers=layers)
    await (await fetches.start(make_request(plan), HANG_S)).wait()
    ((found,), _) = await fetches.contents()
    wanted = merge((part.start, part.end) for part in plan.ranges)
    assert [(span.start, span.end) for span in found.landed] == list(wanted)
    assert found.landed_bytes == plan.total_bytes


async def test_what_comes_from_disk_is_told_in_the_timeline_and_in_reports(tmp_path: Path) -> None:
    plan = make_plan(tmp_path / "m")
    tier = Tier.open(tmp_path / "tier")
    disk = DiskTier.open(tmp_path / "disk", disk_bytes=1 << 30)
    fetches = Fetches(tier, FetchLimits(threads=2), disk=disk)
    await (await fetches.start(make_request(plan), HANG_S)).wait()
    upkeep = DiskUpkeep(tier, disk)
    while upkeep.write_next():
        pass
    await fetches.release("tiny.1.0")
    reported, used_bytes = await fetches.contents()
    assert used_bytes == 0
    assert sum(span.end - span.start for it in reported for span in it.on_disk) >= (
        plan.total_bytes
    )
    assert not any(it.landed_bytes or it.landed for it in reported)
    (tmp_path / "m").rename(tmp_path / "away")
    with patient_fetches():
        await (await fetches.start(make_request(plan), HANG_S)).wait()
    (span,) = await fetches.spans("tiny.1.0")
    assert (span.label, span.size_bytes >= plan.total_bytes) == ("fetch from disk", True)
    await fetches.close()
    disk.close()


async def bytes_left_of(plan: FetchPlan, fetches: Fetches) -> int:
    versions = {stored.version for stored in plan.objects}
    found, _ = await fetches.contents()
    return sum(it.landed_bytes for it in found if it.version in versions)


async def test_what_is_only_cached_gives_way_to_a_replica(
    tmp_path: Path,
) -> None:
    old, new = (
        plan_of(write_checkpoint(tmp_path / name, width=4096), fetch_id=f"{name}.1.0")
        for name in ("old", "new")
    )
    room_bytes = 2 * old.total_bytes
    fetches = make_caching(tmp_path, memory_bytes=room_bytes, tier_bytes=room_bytes)
    await use(fetches, old)
    assert await bytes_left_of(old, fetches) >= old.total_bytes
    # Its KV cache leaves a quarter of the model's size to what is cached.
    reserved_bytes = room_bytes - old.total_bytes // 4
    request = replace(make_request(new), reserved_bytes=reserved_bytes)
    await (await fetches.start(request, HANG_S)).wait()
    assert 0 < await bytes_left_of(old, fetches) <= old.total_bytes // 4
    _, used_bytes = await fetches.contents()
    assert used_bytes + reserved_bytes - new.total_bytes <= room_bytes + 2 * 4096
    await fetches.release("new.1.0")
    assert await use(fetches, replace(new, fetch_id="new.2.0")) == 0
    await fetches.close()
