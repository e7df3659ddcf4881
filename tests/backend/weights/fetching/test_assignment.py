"""Who is given what to bring, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from paraserve_backend.byte_ranges import merge
from paraserve_backend.weights.fetching.assignment import Assignment
from paraserve_backend.weights.fetching.tasks import (
    FetchSource,
    FetchWorker,
    Rank,
    Task,
)
from paraserve_backend.weights.sources.base import Holding, StoredObject
from paraserve_backend.weights.tiers.memory import Tier
from tests.support.checkpoints import make_plan

PART_BYTES = 1000


def make_task(number: int) -> Task:
    stored = StoredObject(key="k", size_bytes=1 << 20, version="1")
    start = number * PART_BYTES
    return Task(
        number=number, stored=stored, name="k", start=start, end=start + PART_BYTES, part=number
    )


class Fetch:
    """An assignment of twelve parts, and workers of any source."""

    def __init__(self, tier: Tier, model: Path, *, link_bytes_per_s: float | None = 1.0) -> None:
        self.now_s = 0.0
        self.tasks = [make_task(number) for number in range(12)]
        self.assignment = Assignment(
            tier.begin(make_plan(model)),
            tier,
            self.tasks,
            link_bytes_per_s=link_bytes_per_s,
            now=lambda: self.now_s,
        )
        self.broken_off: list[FetchWorker] = []

    def worker(self, source: FetchSource) -> FetchWorker:
        worker = FetchWorker(source=source, break_off=lambda: self.broken_off.append(worker))
        return worker

    def source(self, rank: Rank, tasks: Iterable[Task] = ()) -> FetchSource:
        """Return a source that has these tasks' bytes."""
        source = self.assignment.add_source(rank)
        if rank is not Rank.STORE:
            self.say(source, tasks)
        return source

    def say(self, source: FetchSource, tasks: Iterable[Task], coming: Iterable[Task] = ()) -> None:
        holding = Holding(
            landed=merge(task.byte_range for task in tasks),
            coming=merge(task.byte_range for task in coming),
        )
        self.assignment.update(source, {"k": holding})

    def bring(self, worker: FetchWorker, seconds: float) -> Task:
        """Take a task and have it done after so long."""
        task = self.assignment.take(worker)
        assert task is not None
        self.now_s += seconds
        assert self.assignment.done(task, worker)
        return task


@pytest.fixture
def fetch(tier: Tier, model: Path) -> Fetch:
    return Fetch(tier, model)


def take_all(fetch: Fetch, worker: FetchWorker) -> list[Task]:
    taken = []
    while (task := fetch.assignment.take(worker)) is not None:
        taken.append(task)
        fetch.assignment.done(task, worker)
    return taken


def test_the_first_bytes_are_taken_first(fetch: Fetch) -> None:
    store = fetch.worker(fetch.source(Rank.STORE))
    assert take_all(fetch, store) == fetch.tasks
    assert fetch.assignment.is_complete


def test_bytes_are_left_to_the_disk_then_to_peers_then_to_the_store(fetch: Fetch) -> None:
    on_disk, at_peer = fetch.tasks[:4], fetch.tasks[2:8]
    disk, peer = fetch.source(Rank.DISK, on_disk), fetch.source(Rank.PEER, at_peer)
    store = fetch.source(Rank.STORE)
    assert take_all(fetch, fetch.worker(store)) == fetch.tasks[8:]
    assert take_all(fetch, fetch.worker(peer)) == fetch.tasks[4:8]
    assert take_all(fetch, fetch.worker(disk)) == fetch.tasks[:4]


def test_what_a_lost_source_had_is_the_others(fetch: Fetch) -> None:
    disk, store = fetch.source(Rank.DISK, fetch.tasks), fetch.source(Rank.STORE)
    assert take_all(fetch, fetch.worker(store)) == []
    fetch.assignment.lose(disk)
    assert fetch.assignment.take(fetch.worker(disk)) is None
    assert take_all(fetch, fetch.worker(store)) == fetch.tasks


def test_a_peer_that_has_not_answered_is_waited_for_but_not_long(fetch: Fetch) -> None:
    fetch.assignment.add_source(Rank.PEER)
    store = fetch.worker(fetch.source(Rank.STORE))
    assert fetch.assignment.take(store) is None
    fetch.now_s = 0.2
    assert fetch.assignment.take(store) is not None


def test_what_is_coming_to_a_peer_is_left_to_it_but_not_yet_taken(fetch: Fetch) -> None:
    peer, store = fetch.source(Rank.PEER), fetch.source(Rank.STORE)
    fetch.say(peer, fetch.tasks[:1], coming=fetch.tasks[1:3])
    assert take_all(fetch, fetch.worker(store)) == fetch.tasks[3:]
    assert take_all(fetch, fetch.worker(peer)) == fetch.tasks[:1]
    assert fetch.assignment.wait(peer)
    assert not fetch.assignment.is_complete


def test_the_store_helps_as_soon_as_the_link_falls_idle(tier: Tier, model: Path) -> None:
    """Also late in a fetch that went fast until then."""
    fetch = Fetch(tier, model, link_bytes_per_s=1e4)
    peer = fetch.worker(fetch.source(Rank.PEER, fetch.tasks))
    store = fetch.worker(fetch.source(Rank.STORE))
    for _ in range(8):
        fetch.bring(peer, 0.1)  # as fast as the link
    assert fetch.assignment.take(store) is None
    fetch.now_s += 0.3
    assert fetch.assignment.take(store) is not None


class TestLate:
    """A task that takes far longer than an idle worker would need is that worker's."""

    @pytest.fixture
    def sources(self, fetch: Fetch) -> tuple[FetchSource, FetchSource]:
        return fetch.source(Rank.PEER, fetch.tasks[:1]), fetch.source(Rank.STORE)

    def test_its_worker_is_told_to_stop_and_its_source_asked_no_more(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        slow, quick = map(fetch.worker, sources)
        late = fetch.assignment.take(slow)
        assert late is not None
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        fetch.now_s += 1.0
        assert fetch.assignment.take(quick) is late
        assert fetch.broken_off == [slow]
        assert sources[0].is_lost
        # Whatever the slow worker does now changes nothing.
        fetch.assignment.give_back(late, slow)
        assert not fetch.assignment.done(late, slow)
        assert not fetch.assignment.is_complete
        assert fetch.assignment.done(late, quick)
        assert fetch.assignment.is_complete

    def test_it_is_not_late_while_there_is_something_else_to_do(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        slow, quick = map(fetch.worker, sources)
        late = fetch.assignment.take(slow)
        fetch.now_s += 100.0
        assert late not in [fetch.bring(quick, 0.01) for _ in fetch.tasks[1:]]

    def test_it_is_not_late_where_everybody_is_as_slow(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        peer, store = map(fetch.worker, sources)
        for _ in fetch.tasks[1:]:
            fetch.bring(store, 10.0)
        assert fetch.assignment.take(peer) is not None
        fetch.now_s += 25.0
        assert fetch.assignment.take(store) is None
        fetch.now_s += 10.0
        assert fetch.assignment.take(store) is not None

    def test_it_is_not_taken_within_a_second(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        peer, store = map(fetch.worker, sources)
        for _ in fetch.tasks[1:]:
            fetch.bring(store, 0.001)
        fetch.assignment.take(peer)
        fetch.now_s += 0.9
        assert fetch.assignment.take(store) is None

    def test_another_connection_to_the_store_takes_it_and_the_store_is_not_lost(
        self, fetch: Fetch
    ) -> None:
        store = fetch.source(Rank.STORE)
        slow, quick = fetch.worker(store), fetch.worker(store)
        late = fetch.assignment.take(slow)
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        assert fetch.assignment.take(quick) is late
        assert fetch.broken_off == [slow]
        assert not store.is_lost

    def test_it_is_taken_away_once_only(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        workers = [fetch.worker(store) for _ in range(3)]
        fetch.assignment.take(workers[0])
        for _ in fetch.tasks[1:]:
            fetch.bring(workers[1], 0.1)
        assert fetch.assignment.take(workers[1]) is not None
        fetch.now_s += 1000.0
        assert fetch.assignment.take(workers[2]) is None

    def test_it_is_taken_only_by_who_has_it(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        peer = fetch.source(Rank.PEER, fetch.tasks[1:])
        slow, quick = fetch.worker(store), fetch.worker(peer)
        fetch.assignment.take(slow)
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        fetch.now_s += 1000.0
        assert fetch.assignment.take(quick) is None
