"""Who is given what to bring, on a clock of the test's own."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from paraserve_backend.byte_ranges import merge
from paraserve_backend.weights.fetching.assignment import Assignment, TakeOver, TaskOffer
from paraserve_backend.weights.fetching.tasks import (
    FetchSource,
    FetchWorker,
    Rank,
    Task,
)
from paraserve_backend.weights.sources.base import Holding, StoredObject

PART_BYTES = 1000


def make_task(number: int) -> Task:
    stored = StoredObject(key="k", size_bytes=1 << 20, version="1")
    start = number * PART_BYTES
    return Task(
        number=number, stored=stored, name="k", start=start, end=start + PART_BYTES, part=number
    )


class Fetch:
    """An assignment of twelve parts, and workers of any source."""

    def __init__(self, *, link_bytes_per_s: float | None = 1.0) -> None:
        self.now_s = 0.0
        self.tasks = [make_task(number) for number in range(12)]
        self.assignment = Assignment(
            self.tasks, link_bytes_per_s=link_bytes_per_s, now=lambda: self.now_s
        )
        #: Workers whose tasks went to others.
        self.late: list[FetchWorker] = []

    def worker(self, source: FetchSource) -> FetchWorker:
        return FetchWorker(source=source, break_off=lambda: None)

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

    def offer(self, worker: FetchWorker, after: TaskOffer | None = None) -> TaskOffer:
        step = self.assignment.next(worker, after)
        assert isinstance(step, TaskOffer)
        return step

    def take(self, worker: FetchWorker) -> Task | None:
        """Have a worker do what it should, on a node where nobody else fetches."""
        step = self.assignment.next(worker)
        match step:
            case TaskOffer():
                self.assignment.granted(step.task, worker)
            case TakeOver():
                self.late.append(step.late_worker)
        return step.task if step else None

    def end(self, task: Task, worker: FetchWorker) -> None:
        assert self.assignment.settle(task, worker)
        self.assignment.done(task, worker)

    def bring(self, worker: FetchWorker, seconds: float) -> Task:
        """Take a task and have it done after so long."""
        task = self.take(worker)
        assert task is not None
        self.now_s += seconds
        self.end(task, worker)
        return task


@pytest.fixture
def fetch() -> Fetch:
    return Fetch()


def take_all(fetch: Fetch, worker: FetchWorker) -> list[Task]:
    taken = []
    while (task := fetch.take(worker)) is not None:
        taken.append(task)
        fetch.end(task, worker)
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
    assert fetch.take(fetch.worker(disk)) is None
    assert take_all(fetch, fetch.worker(store)) == fetch.tasks


def test_a_peer_that_has_not_answered_is_waited_for_but_not_long(fetch: Fetch) -> None:
    fetch.assignment.add_source(Rank.PEER)
    store = fetch.worker(fetch.source(Rank.STORE))
    assert fetch.take(store) is None
    fetch.now_s = 0.2
    assert fetch.take(store) is not None


def test_what_is_coming_to_a_peer_is_left_to_it_but_not_yet_taken(fetch: Fetch) -> None:
    peer, store = fetch.source(Rank.PEER), fetch.source(Rank.STORE)
    fetch.say(peer, fetch.tasks[:1], coming=fetch.tasks[1:3])
    assert take_all(fetch, fetch.worker(store)) == fetch.tasks[3:]
    assert take_all(fetch, fetch.worker(peer)) == fetch.tasks[:1]
    assert fetch.assignment.wait(peer)
    assert not fetch.assignment.is_complete


def test_the_store_helps_as_soon_as_the_link_falls_idle() -> None:
    """Also late in a fetch that went fast until then."""
    fetch = Fetch(link_bytes_per_s=1e4)
    peer = fetch.worker(fetch.source(Rank.PEER, fetch.tasks))
    store = fetch.worker(fetch.source(Rank.STORE))
    for _ in range(8):
        fetch.bring(peer, 0.1)  # as fast as the link
    assert fetch.take(store) is None
    fetch.now_s += 0.3
    assert fetch.take(store) is not None


class TestShared:
    """Other fetches of the node have, or are bringing, some of the bytes."""

    def test_a_task_is_offered_to_one_worker_at_a_time(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        assert fetch.offer(fetch.worker(store)).task == fetch.tasks[0]
        assert fetch.offer(fetch.worker(store)).task == fetch.tasks[1]

    def test_what_is_busy_is_passed_over_and_offered_again_the_next_time(
        self, fetch: Fetch
    ) -> None:
        store = fetch.worker(fetch.source(Rank.STORE))
        first = fetch.offer(store)
        fetch.assignment.busy(first.task)
        second = fetch.offer(store, after=first)
        fetch.assignment.busy(second.task)
        assert [first.task, second.task] == fetch.tasks[:2]
        assert fetch.offer(store, after=second).task == fetch.tasks[2]
        assert fetch.offer(store).task == fetch.tasks[0]

    def test_what_was_adopted_counts_as_reused_and_is_not_offered_again(self, fetch: Fetch) -> None:
        store = fetch.worker(fetch.source(Rank.STORE))
        first = fetch.offer(store)
        fetch.assignment.adopted(first.task)
        assert fetch.assignment.adopted_bytes == PART_BYTES
        assert take_all(fetch, store) == fetch.tasks[1:]
        assert fetch.assignment.is_complete

    def test_a_worker_waits_while_all_is_offered_to_another(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        asking, idle = fetch.worker(store), fetch.worker(store)
        offers = [fetch.offer(asking) for _ in fetch.tasks]
        fetch.now_s += 1000.0
        # Nor is an offer late: it is not claimed yet.
        assert fetch.assignment.next(idle) is None
        assert not fetch.assignment.is_complete
        assert fetch.assignment.wait(store)
        fetch.assignment.busy(offers[3].task)
        assert fetch.offer(idle).task == fetch.tasks[3]

    def test_what_was_given_back_is_offered_first(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        failing, other = fetch.worker(store), fetch.worker(store)
        failed = fetch.take(failing)
        assert failed is not None
        assert fetch.take(other) == fetch.tasks[1]
        assert fetch.assignment.settle(failed, failing)
        fetch.assignment.give_back(failed)
        assert fetch.take(other) is failed


class TestLate:
    """A task that takes far longer than an idle worker would need is that worker's."""

    @pytest.fixture
    def sources(self, fetch: Fetch) -> tuple[FetchSource, FetchSource]:
        return fetch.source(Rank.PEER, fetch.tasks[:1]), fetch.source(Rank.STORE)

    def test_its_worker_is_told_to_stop_and_its_source_asked_no_more(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        slow, quick = map(fetch.worker, sources)
        late = fetch.take(slow)
        assert late is not None
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        fetch.now_s += 1.0
        assert fetch.take(quick) is late
        assert fetch.late == [slow]
        assert sources[0].is_lost
        # Whatever the slow worker does now changes nothing.
        assert not fetch.assignment.settle(late, slow)
        assert not fetch.assignment.is_complete
        fetch.end(late, quick)
        assert fetch.assignment.is_complete

    def test_it_is_not_late_while_there_is_something_else_to_do(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        slow, quick = map(fetch.worker, sources)
        late = fetch.take(slow)
        fetch.now_s += 100.0
        assert late not in [fetch.bring(quick, 0.01) for _ in fetch.tasks[1:]]

    def test_it_is_not_late_where_everybody_is_as_slow(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        peer, store = map(fetch.worker, sources)
        for _ in fetch.tasks[1:]:
            fetch.bring(store, 10.0)
        assert fetch.take(peer) is not None
        fetch.now_s += 25.0
        assert fetch.take(store) is None
        fetch.now_s += 10.0
        assert fetch.take(store) is not None

    def test_it_is_not_taken_within_a_second(
        self, fetch: Fetch, sources: tuple[FetchSource, FetchSource]
    ) -> None:
        peer, store = map(fetch.worker, sources)
        for _ in fetch.tasks[1:]:
            fetch.bring(store, 0.001)
        fetch.take(peer)
        fetch.now_s += 0.9
        assert fetch.take(store) is None

    def test_another_connection_to_the_store_takes_it_and_the_store_is_not_lost(
        self, fetch: Fetch
    ) -> None:
        store = fetch.source(Rank.STORE)
        slow, quick = fetch.worker(store), fetch.worker(store)
        late = fetch.take(slow)
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        assert fetch.take(quick) is late
        assert fetch.late == [slow]
        assert not store.is_lost

    def test_it_is_taken_away_once_only(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        workers = [fetch.worker(store) for _ in range(3)]
        fetch.take(workers[0])
        for _ in fetch.tasks[1:]:
            fetch.bring(workers[1], 0.1)
        assert fetch.take(workers[1]) is not None
        fetch.now_s += 1000.0
        assert fetch.take(workers[2]) is None

    def test_it_is_not_taken_once_its_read_has_ended(self, fetch: Fetch) -> None:
        """The claim to it is being given up, and cannot go over."""
        store = fetch.source(Rank.STORE)
        slow, quick = fetch.worker(store), fetch.worker(store)
        late = fetch.take(slow)
        assert late is not None
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        fetch.now_s += 1000.0
        assert fetch.assignment.settle(late, slow)
        assert fetch.take(quick) is None
        fetch.assignment.give_back(late)
        assert fetch.take(quick) is late

    def test_it_is_taken_only_by_who_has_it(self, fetch: Fetch) -> None:
        store = fetch.source(Rank.STORE)
        peer = fetch.source(Rank.PEER, fetch.tasks[1:])
        slow, quick = fetch.worker(store), fetch.worker(peer)
        fetch.take(slow)
        for _ in fetch.tasks[1:]:
            fetch.bring(quick, 0.1)
        fetch.now_s += 1000.0
        assert fetch.take(quick) is None
